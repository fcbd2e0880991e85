// Alignment and averaging of LoRA factors on a CPU: cross-covariance, rotation and rotated average of one adapter while its
// factors are in the cache, for the instruction set of the machine. Called through ctypes; see library.py.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <thread>
#include <type_traits>
#include <vector>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define HAS_X86 1
#include <immintrin.h>
#endif

// Loops over arrays of vectors, which stay in registers only if the compiler unrolls them at once.
#define UNROLL _Pragma("GCC unroll 16")

namespace fedrot {

// Dtypes, as Python gives and gets them.
enum : int32_t { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2, FLOAT64 = 3, OTHER = 4 };

struct BFloat16 {
  uint16_t bits;
};

struct Float16 {
  uint16_t bits;
};

struct Step {
  float a, b, c;
};

inline float widen(float x) { return x; }

inline float widen(BFloat16 x) {
  uint32_t bits = (uint32_t)x.bits << 16;
  float f;
  memcpy(&f, &bits, sizeof f);
  return f;
}

inline float widen(Float16 x) {
  uint32_t sign = (uint32_t)(x.bits & 0x8000) << 16, magnitude = x.bits & 0x7fff;
  float f;
  if (magnitude < 0x0400) {  // zero or subnormal
    f = magnitude * 0x1p-24f;
    return sign ? -f : f;
  }
  uint32_t bits = magnitude >= 0x7c00 ? (magnitude << 13) + 0x70000000u : (magnitude << 13) + 0x38000000u;
  bits |= sign;
  memcpy(&f, &bits, sizeof f);
  return f;
}

// Rounds to the nearest, ties to even.
inline Float16 to_half(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  uint16_t sign = (bits >> 16) & 0x8000;
  bits &= 0x7fffffff;
  if (bits > 0x7f800000) return {(uint16_t)(sign | 0x7e00)};
  if (bits >= 0x477ff000) return {(uint16_t)(sign | 0x7c00)};
  if (bits < 0x38800000) {  // subnormal: the sum's own rounding is the right one
    float magic;
    uint32_t magic_bits = 0x3f000000;
    memcpy(&magic, &magic_bits, sizeof magic);
    float f;
    memcpy(&f, &bits, sizeof f);
    f += magic;
    memcpy(&bits, &f, sizeof bits);
    return {(uint16_t)(sign | (bits - magic_bits))};
  }
  bits += 0xc8000fff + ((bits >> 13) & 1);
  return {(uint16_t)(sign | (bits >> 13))};
}

// The least magnitude that rounds to Inf.
template <class T>
inline float largest() {
  if (std::is_same<T, Float16>::value) return 65520.0f;
  if (std::is_same<T, BFloat16>::value) return 0x1.ffp127f;
  return INFINITY;
}

// The sweeps of a consensus; see groupwise/consensus.py.
struct Sweeps {
  double others, consensus, slowest;  // of tolerances.py
  int32_t most, on;                   // on: 1 for A, 2 for B, 3 for both
  uint8_t* unsure;                    // per adapter: a rotation was not sure, and nothing was averaged
};

// The descent to the least error; see groupwise/least_error.py.
struct Descent {
  double others, first, shorter, longer, unbounded, rounding, least, ridge, strength;
  const double* shares;  // per client, summing to 1
  int32_t sweeps, most;
};

struct Problem {
  int32_t adapters, clients, reflections, threads, n_steps;
  float strength, converged;
  const int64_t* shapes;        // per adapter r, d_in, d_out
  const int32_t* dtypes;        // per adapter float32, bfloat16 or float16
  const void* const* A;         // per adapter and client (r, d_in)
  const void* const* B;         // per adapter and client (d_out, r)
  const void* const* A_ref;     // per adapter, or null
  const void* const* B_ref;     // per adapter, or null
  const float* shares;          // per client, summing to 1
  const float* weights;         // per client, in any unit: by them factors are averaged that are not rotated
  const Step* steps;
  float* const* R;              // per adapter (N, r, r), given where there is no reference; or null
  float* residual;              // (L, N)
  int64_t* undetermined;        // (L, N)
  uint8_t* doubtful;            // (L, N)
  void* const* A_out;           // per adapter; or null, and nothing is averaged
  void* const* B_out;           // likewise
  uint8_t* finite;              // per adapter
  const uint8_t* const* shifts;  // of the sketches of A and of B, per adapter two; see sketch.py
  const float* const* signs;    // likewise
  double* estimates;            // per adapter 7, see estimate; or null
  double* squares;              // the sum over adapters of the squares of their errors' sketches (32, 32)
  int32_t (*careful)(int32_t);  // finds the doubtful rotations of an adapter; not 0 if it could not
  std::atomic<bool>* failed;
  float* lost;                  // per adapter the sketch of its error (32, 32); the library's own

  float* const* sketches;       // per adapter the sketches of B^T and then of A, (2, N, r, 32); or null
  float total;                  // the sum of the weights
  int32_t adds;                 // whether A_out and B_out are float32 sums to which the rotated factors are added
  const int32_t* ref_dtypes;    // of the references, per adapter as in dtypes; or null, and all are float32
  const Sweeps* sweeps;         // of the consensus that clients are rotated to, and not to the reference; or null
  double* errors;               // per adapter the result's error, the update's norm and the plain average's error; or null
  uint8_t* unsure;              // per adapter: its errors were not measured
  const Descent* descent;       // to the least error of clients that are averaged, which is measured; or null
  double* angles;               // (L, N), of the rotations that are found or added, in degrees; or null
  double* products;             // (L, N, N), of clients' updates with each other, which are measured; or null
  double* sizes;                // (L, N), of what those products are sums of

  bool is_aligned() const { return R != nullptr; }
  bool finds_rotations() const { return A_ref || B_ref; }
};

// The number of doubles that a flip needs; see flip.inc.
inline size_t flip_room(size_t r) { return 3 * r * (r + 8) + 5 * (r + 8); }

// Memory of one thread.
struct Scratch {
  std::vector<double> doubles, more, wide;
  std::vector<float> floats, A_ref, wide_A_ref, wide_B_ref, sum_A, sum_B, sketches, vectors, panel, means;
  std::vector<double> grams[2][2];
  double scale_A, scale_B;

  void reserve(size_t r, size_t values, size_t in_vectors, size_t size_A, size_t size_B) {
    doubles.resize(2 * r * r);
    more.resize(flip_room(r));
    floats.resize(values);
    vectors.resize(in_vectors + 16);
    if (sum_A.size() < size_A) sum_A.resize(size_A);
    if (sum_B.size() < size_B) sum_B.resize(size_B);
  }

  // Where vectors of any length can begin.
  float* aligned() { return (float*)(((uintptr_t)vectors.data() + 63) / 64 * 64); }
};

enum class Size { regular, tiny, zero, wrong };

// Below it, products in float32 may have underflowed.
const double smallest_product = 1e-30;

inline double inverse_square(const float* x, long n) {
  double total = 0;
  for (long i = 0; i < n; i++) total += (double)x[i] * x[i];
  return total == 0 ? 1 : 1 / total;
}

#include "stream_state.inc"

#define LANES 4
namespace baseline {
#include "kernels.inc"
}
#undef LANES

#ifdef HAS_X86
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#define LANES 8
namespace avx2 {
#include "kernels.inc"
}
#undef LANES
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,prefer-vector-width=512")
#define LANES 16
namespace avx512 {
#include "kernels.inc"
}
#undef LANES
#pragma GCC pop_options
#endif

// Adds the squares of L sketches, always in one order.
template <class Sketch>
void add_squares(Sketch sketch_of, int L, double* squares) {
  for (int i = 0; i < L; i++) {
    const auto* lost = sketch_of(i);
    for (int e = 0; e < 32 * 32; e++) squares[e] += (double)lost[e] * lost[e];
  }
}

using Align = void (*)(const Problem&, int, Scratch&);

inline Align implementation(int32_t level) {
#ifdef HAS_X86
  if (level >= 2) return avx512::align;
  if (level == 1) return avx2::align;
#endif
  (void)level;
  return baseline::align;
}

// Calls work(item, scratch) for all items, in threads, until one has failed.
template <class Work>
void in_threads(int32_t threads, int32_t items, const std::atomic<bool>& failed, Work work) {
  std::atomic<int32_t> next{0};
  auto run = [&] {
    Scratch scratch;
    for (int32_t i; !failed && (i = next++) < items;) work(i, scratch);
  };
  std::vector<std::thread> others;
  for (int32_t t = 1; t < (threads < items ? threads : items); t++) others.emplace_back(run);
  run();
  for (auto& thread : others) thread.join();
}

}  // namespace fedrot

extern "C" {

// A hash of the sources that the library was built from, by which library.py tells one of another version; 0 if it is unknown.
#ifndef FEDROT_SOURCES
#define FEDROT_SOURCES 0
#endif
uint64_t fedrot_sources() { return FEDROT_SOURCES; }

// 0 for the least instructions of the architecture, 1 for AVX2 with FMA and F16C, 2 for AVX-512.
int32_t fedrot_level() {
#ifdef HAS_X86
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !__builtin_cpu_supports("f16c")) return 0;
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    return 2;
  return 1;
#endif
  return 0;
}

int32_t fedrot_align_average(fedrot::Problem* problem, int32_t level) {
  std::atomic<bool> failed{false};
  std::vector<float> lost(problem->squares ? (size_t)problem->adapters * 32 * 32 : 0);
  problem->failed = &failed;
  problem->lost = lost.data();
  fedrot::Align align = fedrot::implementation(level);
  fedrot::in_threads(problem->threads, problem->adapters, failed,
                     [&](int32_t adapter, fedrot::Scratch& scratch) { align(*problem, adapter, scratch); });
  if (problem->squares && !failed)
    fedrot::add_squares([&](int i) { return lost.data() + i * 32 * 32; }, problem->adapters, problem->squares);
  return failed;
}
}

#include "tensors.inc"
#include "stream_calls.inc"
