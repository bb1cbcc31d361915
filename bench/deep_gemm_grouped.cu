#include "bench/deep_gemm_product.cuh"

namespace dsv4::deep_gemm {

bool multiply_grouped(const Product& call, cudaStream_t stream) {
  if (call.rows != 1024 || call.cols != 4096) return false;
  const int tokens = call.tokens;
  if (call.groups == 8) {
    if (tokens <= 16) {
      run_product<8, 1024, 4096, 16, 64, 1, 1>(call, stream);
    } else if (tokens <= 64) {
      run_product<8, 1024, 4096, 64, 64, 1, 1>(call, stream);
    } else if (tokens <= 128) {
      run_product<8, 1024, 4096, 64, 128, 1, 1>(call, stream);
    } else {
      run_product<8, 1024, 4096, 256, 128, 1, 1>(call, stream);
    }
    return true;
  }
  if (call.groups != 16) return false;
  if (tokens <= 16) {
    run_product<16, 1024, 4096, 16, 128, 1, 1>(call, stream);
  } else if (tokens <= 64) {
    run_product<16, 1024, 4096, 64, 128, 1, 1>(call, stream);
  } else if (tokens <= 128) {
    run_product<16, 1024, 4096, 128, 128, 1, 1>(call, stream);
  } else {
    run_product<16, 1024, 4096, 256, 128, 1, 1>(call, stream);
  }
  return true;
}

}  // namespace dsv4::deep_gemm
