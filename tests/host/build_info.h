// What csrc/cmake/build_info.py writes into a real build.
#pragma once

namespace amskv {

inline constexpr char kCudaVersion[] = "none";
inline constexpr char kArchitectures[] = "host";
inline constexpr char kBuildInfo[] =
    R"json({"version": "host", "cuda": "none", "architectures": "host", "kernels": []})json";

}  // namespace amskv
