# The CUDA toolkit and the architectures that kernels are compiled for.
#   DSV4_CUDA_ARCHITECTURES  of kernels that run everywhere: sm_80 with its PTX (the driver translates it for newer cards),
#                            sm_90a, sm_120. Files named *_sm90a.cu are compiled for sm_90a alone.
if(NOT CMAKE_CUDA_COMPILER)
  find_program(DSV4_NVCC nvcc HINTS ENV CUDA_PATH PATHS /usr/local/cuda/bin)
  if(NOT DSV4_NVCC)
    message(FATAL_ERROR "DSV4_ENABLE_CUDA=ON: nvcc was not found; install the CUDA toolkit (12.8 or newer), or set CUDA_PATH")
  endif()
  set(CMAKE_CUDA_COMPILER ${DSV4_NVCC})
endif()
set(DSV4_CUDA_ARCHITECTURES "80;90a-real;120-real" CACHE STRING "Architectures of portable CUDA kernels")
set(CMAKE_CUDA_ARCHITECTURES ${DSV4_CUDA_ARCHITECTURES})
set(CMAKE_CUDA_RUNTIME_LIBRARY Static)
if(DSV4_CCACHE AND NOT CMAKE_CUDA_COMPILER_LAUNCHER)
  set(CMAKE_CUDA_COMPILER_LAUNCHER ${DSV4_CCACHE})
endif()
enable_language(CUDA)
find_package(CUDAToolkit 12.8 REQUIRED)
# CMake 3.25 does not know that nvcc 12 and later take C++20.
if(NOT DEFINED CMAKE_CUDA20_STANDARD_COMPILE_OPTION)
  set(CMAKE_CUDA20_STANDARD_COMPILE_OPTION "-std=c++20")
  set(CMAKE_CUDA20_EXTENSION_COMPILE_OPTION "-std=c++20")
endif()
set(CMAKE_CUDA_STANDARD 20)
set(CMAKE_CUDA_STANDARD_REQUIRED ON)
set(CMAKE_CUDA_EXTENSIONS OFF)

# -fmad is left on: kernels that must round products separately say so with __fmul_rn. ptxas reports spills in hot kernels.
set(DSV4_CUDA_FLAGS $<$<COMPILE_LANGUAGE:CUDA>:--expt-relaxed-constexpr -Xcompiler=-Wall,-Wextra,-ffp-contract=off
                    -diag-suppress=186,20012>)
if(DSV4_WERROR)
  list(APPEND DSV4_CUDA_FLAGS $<$<COMPILE_LANGUAGE:CUDA>:-Werror=all-warnings>)
endif()

option(DSV4_CUDA_LATE_WARPS "sm_90 kernels: warps are late at random around barriers (docs/testing.md)" OFF)
if(DSV4_CUDA_LATE_WARPS)
  list(APPEND DSV4_CUDA_FLAGS $<$<COMPILE_LANGUAGE:CUDA>:-DDSV4_CUDA_LATE_WARPS>)
endif()

# "sm_80,compute_80,sm_90a,sm_120": what the descriptors say that kernels were built for.
set(DSV4_CUDA_ARCHITECTURE_NAMES "")
foreach(arch IN LISTS DSV4_CUDA_ARCHITECTURES)
  string(REGEX REPLACE "-(real|virtual)$" "" number ${arch})
  if(NOT arch MATCHES "-virtual$")
    list(APPEND DSV4_CUDA_ARCHITECTURE_NAMES sm_${number})
  endif()
  if(NOT arch MATCHES "-real$")
    list(APPEND DSV4_CUDA_ARCHITECTURE_NAMES compute_${number})
  endif()
endforeach()
list(JOIN DSV4_CUDA_ARCHITECTURE_NAMES "," DSV4_CUDA_ARCHITECTURE_NAMES)
