# Builds with the Python module. Included before everything else: wheels decide here what goes into them.
if(SKBUILD AND NOT DEFINED DSV4_ENABLE_CUDA)
  # `pip install .` brings the NVIDIA backend where the toolkit is; --config-settings=cmake.define.DSV4_ENABLE_CUDA=OFF leaves it out.
  find_program(DSV4_NVCC nvcc HINTS ENV CUDA_PATH PATHS /usr/local/cuda/bin PATH_SUFFIXES bin)
  if(DSV4_NVCC)
    set(DSV4_ENABLE_CUDA ON CACHE BOOL "Build the NVIDIA backend")
    message(STATUS "dsv4: nvcc found, the wheel gets the NVIDIA backend")
  endif()
endif()

# A wheel carries what it needs: PCRE2 is linked in where the system has its archive.
macro(dsv4_link_pcre2_statically)
  find_library(DSV4_PCRE2_ARCHIVE NAMES libpcre2-8.a HINTS ${PCRE2_LIBRARY_DIRS} ${PCRE2_LIBDIR})
  if(DSV4_PCRE2_ARCHIVE)
    set_target_properties(PkgConfig::PCRE2 PROPERTIES INTERFACE_LINK_LIBRARIES ${DSV4_PCRE2_ARCHIVE})
  endif()
endmacro()
