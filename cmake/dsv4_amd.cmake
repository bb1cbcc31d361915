# Compiles HIP kernels to code objects of AMD GPUs: clang alone, no ROCm, no HIP header.
find_program(DSV4_AMD_CLANG NAMES clang++-22 amdclang++
             HINTS /usr/lib/llvm-22/bin /opt/rocm/bin /opt/rocm/llvm/bin)

# Maths is as written: no contraction beyond what the source asks for, denormals kept.
set(DSV4_AMD_FLAGS -x hip --cuda-device-only --no-gpu-bundle-output -nogpuinc -nogpulib -mcode-object-version=5
                   -std=c++20 -O3 -ffp-contract=off -Wall -Wextra -Werror)

# dsv4_amd_code_objects(<target> SOURCES <file.hip>... [ARCHS gfx942 gfx950] [DEFINITIONS A=1...] [INCLUDES dir...]
#                       [OUTPUT_DIRECTORY dir])
# Target <target> builds <dir>/<stem>_<arch>.co from every source for every architecture. The paths are its property
# DSV4_CODE_OBJECTS.
function(dsv4_amd_code_objects target)
  cmake_parse_arguments(ARG "" "OUTPUT_DIRECTORY" "SOURCES;ARCHS;DEFINITIONS;INCLUDES" ${ARGN})
  if(NOT DSV4_AMD_CLANG)
    message(FATAL_ERROR "DSV4_ENABLE_HIP needs clang++-22 or amdclang++ (package clang-22), or DSV4_AMD_CLANG=<path>")
  endif()
  if(NOT ARG_ARCHS)
    set(ARG_ARCHS gfx942 gfx950)
  endif()
  if(NOT ARG_OUTPUT_DIRECTORY)
    set(ARG_OUTPUT_DIRECTORY ${CMAKE_CURRENT_BINARY_DIR})
  endif()
  set(flags ${DSV4_AMD_FLAGS} -I${PROJECT_SOURCE_DIR}/src -I${PROJECT_SOURCE_DIR}/include)
  foreach(include IN LISTS ARG_INCLUDES)
    list(APPEND flags -I${include})
  endforeach()
  foreach(definition IN LISTS ARG_DEFINITIONS)
    list(APPEND flags -D${definition})
  endforeach()
  file(MAKE_DIRECTORY ${ARG_OUTPUT_DIRECTORY})
  set(objects)
  foreach(source IN LISTS ARG_SOURCES)
    get_filename_component(source ${source} ABSOLUTE)
    get_filename_component(stem ${source} NAME_WE)
    foreach(arch IN LISTS ARG_ARCHS)
      set(object ${ARG_OUTPUT_DIRECTORY}/${stem}_${arch}.co)
      # clang ignores -MD here; the dependency file is asked of the front end.
      add_custom_command(
        OUTPUT ${object}
        COMMAND ${DSV4_AMD_CLANG} ${flags} --offload-arch=${arch} -Xclang -dependency-file -Xclang ${object}.d
                -Xclang -MT -Xclang ${object} ${source} -o ${object}
        DEPENDS ${source}
        DEPFILE ${object}.d
        COMMENT "Compiling ${stem} for ${arch}"
        VERBATIM)
      list(APPEND objects ${object})
    endforeach()
  endforeach()
  add_custom_target(${target} ALL DEPENDS ${objects})
  set_target_properties(${target} PROPERTIES DSV4_CODE_OBJECTS "${objects}")
endfunction()
