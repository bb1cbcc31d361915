# One target per folder: every .cc file of the folder, include roots include/ and src/, warnings, bit-exact floating point.

# -ffp-contract=off: compilers may otherwise fuse a*b+c, and then bits depend on inlining (docs/kernels/linear.md).
set(DSV4_CXX_FLAGS -Wall -Wextra -ffp-contract=off)
if(DSV4_WERROR)
  list(APPEND DSV4_CXX_FLAGS -Werror)
endif()
if(DSV4_SANITIZE)
  list(APPEND DSV4_CXX_FLAGS -fsanitize=${DSV4_SANITIZE} -fno-omit-frame-pointer -fno-sanitize-recover=all)
  add_link_options(-fsanitize=${DSV4_SANITIZE})
endif()

# Files named *_<isa>.cc are compiled for that instruction set; they run only behind a run-time check.
set(DSV4_ISA_avx2 "-mavx2;-mfma;-mf16c")
set(DSV4_ISA_avx512 "-mavx512f;-mavx512bw;-mavx512dq;-mavx512vl;-mfma;-mprefer-vector-width=512")
set(DSV4_ISA_avx512vnni "${DSV4_ISA_avx512};-mavx512vnni")
set(DSV4_ISA_avx512bf16
    "-mavx512f;-mavx512bw;-mavx512dq;-mavx512vl;-mavx512vbmi;-mavx512vnni;-mavx512bf16;-mfma;-mprefer-vector-width=512")

# g++ 12 warns inside its own avx512 headers about their undefined-value idiom.
if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
  foreach(isa avx512 avx512vnni avx512bf16)
    list(APPEND DSV4_ISA_${isa} -Wno-uninitialized -Wno-maybe-uninitialized)
  endforeach()
endif()

function(dsv4_isa_flags)
  foreach(file ${ARGN})
    foreach(isa avx2 avx512 avx512vnni avx512bf16)
      if(file MATCHES "_${isa}\\.cc$")
        if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64")
          set_source_files_properties(${file} PROPERTIES COMPILE_OPTIONS "${DSV4_ISA_${isa}}")
        endif()
      endif()
    endforeach()
  endforeach()
endfunction()

# dsv4_folder(<name> [DEPENDS <targets>]): library dsv4_<name> from all .cc files of the current folder.
function(dsv4_folder name)
  cmake_parse_arguments(ARG "" "" "DEPENDS;PRIVATE_DEPENDS;EXTRA_SOURCES" ${ARGN})
  file(GLOB sources CONFIGURE_DEPENDS ${CMAKE_CURRENT_SOURCE_DIR}/*.cc)
  list(APPEND sources ${ARG_EXTRA_SOURCES})
  dsv4_isa_flags(${sources})
  if(sources)
    add_library(dsv4_${name} OBJECT ${sources})
    set(scope PUBLIC)
    target_compile_options(dsv4_${name} PRIVATE ${DSV4_CXX_FLAGS})
  else()
    add_library(dsv4_${name} INTERFACE)
    set(scope INTERFACE)
  endif()
  target_include_directories(dsv4_${name} ${scope} ${PROJECT_SOURCE_DIR}/include ${PROJECT_SOURCE_DIR}/src)
  target_link_libraries(dsv4_${name} ${scope} ${ARG_DEPENDS})
  if(sources AND ARG_PRIVATE_DEPENDS)
    target_link_libraries(dsv4_${name} PRIVATE ${ARG_PRIVATE_DEPENDS})
  endif()
endfunction()
