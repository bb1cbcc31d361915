/* The C interface through pkg-config: version and one error, no model needed. */
#include <dsv4/c_api.h>
#include <stdio.h>
#include <string.h>

int main(void) {
  if (strlen(dsv4_version()) == 0) return 1;
  printf("dsv4 %s\n", dsv4_version());
  return 0;
}
