// A dense decoder (Llama, Qwen2, Qwen3) on AVX-512: token ids and a paged KV cache in, logits out, in one call per step.
//
// Why it exists: at batch sizes of a chat server the time of a step on CPUs goes into many small tensor operations and into matrix-vector
// products that reach half of the memory's bandwidth. Here the threads of a team walk through the layers together, sharing out the pieces of
// each phase, and every product (projections, scores, weighted values) is the same register tile over weights packed once.
//
// Shapes: M packed tokens, N outputs, K inputs of a product; H query heads, G query heads per key head, D head size.
// Every sum runs over K in one order whatever the number of rows: a sequence has the same logits, to the last bit, in any company.
// Packed matrices lie in panels of PANEL columns: f32 [K][32], bf16 [K/2][32][2], i8 [K/2][32][2] for int8 weight-only, u8 [K/4][32][4] for
// int8 (the weight + 128), and for int4 a run per NIBBLES inputs: 32 steps and 32 lows (f16), then u4 [NIBBLES/4][2][16][4], the two
// sixteens in the low and high halves of a byte.
// Knows no scheduling, no sampling and no Python; model.py holds its twin of every struct.

#include <immintrin.h>
#include <sched.h>

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <thread>
#include <vector>

namespace {

constexpr int ABI = 3;       // raised with every change of a struct or a layout
constexpr int PANEL = 32;    // columns of a packed panel: two registers of 16 floats
constexpr int BLOCK = 32;    // positions of a KV block; also a panel of keys
constexpr int NIBBLES = 32;  // inputs that share an int4 step and low
constexpr int NIBBLES_BYTES = 4 * PANEL + NIBBLES * PANEL / 2;
constexpr int AHEAD = 2048;  // bytes of weights that are fetched before their turn
constexpr int PHASES_PER_LAYER = 16, PHASES_AROUND = 4;  // upper bounds
constexpr int SPINS = 4000;  // of a waiting thread before it offers its core to others

enum Part { START, NORM, QKV, ROTATE, ATTENTION, OUTPUT, GATE_UP, DOWN, HEAD, NUM_PARTS };

enum Kind : int32_t { F32 = 0, BF16 = 1, INT8 = 2, INT4 = 3, INT8_WEIGHT_ONLY = 4 };

extern "C" {

struct Linear {  // y = x W^T; `scale` and `bias` per output column, either may be null
  int32_t n, k, kind, group;
  const void *weight;
  const float *scale, *bias;
};

struct Lora {  // y[:, offset : offset + n] += (x A^T) B; A is (rank, k), B is (rank, n) with the adapter's scale in it
  int32_t rank, k, n, offset;
  const float *a, *b;
};

struct Layer {
  const float *input_norm, *post_norm, *q_norm, *k_norm;  // q_norm and k_norm are null but for Qwen3
  Linear qkv, o, gate_up, down;                            // gate_up: 16 gate and 16 up columns in turn
  void *keys, *values;
};

struct Model {
  int32_t hidden, heads, kv_heads, head_dim, ffn, vocab, num_layers, num_threads, kv_kind, embedding_kind;
  float eps, scale;
  const Layer *layers;
  const float *final_norm;
  Linear head;
  const void *embedding;  // (vocab, hidden); null: the rows are those of the head, which is then f32 or bf16
  const float *cosine, *sine;  // (positions, D / 2)
};

struct Segment {  // `num` tokens of one sequence, from `first` on in the packed batch, at positions start, start + 1, ...
  int32_t first, num, start, table, adapter;
};

struct Batch {
  int32_t num_tokens, num_segments, max_blocks, num_outputs, num_adapters;
  const int32_t *ids;         // null: `hidden` holds the input of the first layer
  const Segment *segments;
  const int32_t *tables;      // (sequences, max_blocks) block numbers
  const int32_t *outputs;     // packed indices whose logits are wanted
  float *hidden;              // (num_tokens, hidden) in and out of a pipeline stage; null in a whole model
  float *logits;              // (num_outputs, vocab padded to PANEL); null in stages before the last
  const Lora *loras;          // (num_adapters, num_layers, 7): q k v o gate up down; rank 0 where there is none
};
}

// --- a team of threads that computes one step together

struct alignas(64) Phase {
  std::atomic<int> next{0}, done{0};
};

struct Walker {  // one thread on its way through the phases of a step
  int id, phase;
};

// A phase is over when its pieces are done, not when everybody has come: a thread that the system keeps from running is not waited for
// unless it holds a piece, and catches up by finding phases over. On cores shared with other processes a barrier would cost a time slice.
class Team {
 public:
  explicit Team(int num) : num_(num) {
    for (int i = 1; i < num; ++i) threads_.emplace_back([this, i] { serve(i); });
  }
  ~Team() {
    {
      std::lock_guard<std::mutex> guard(mutex_);
      over_ = true;
      ++round_;
    }
    wake_.notify_all();
    for (auto &thread : threads_) thread.join();
  }
  int size() const { return num_; }

  // All threads that come in time run `work(walker)`; nobody is left in it when this returns.
  template <class Work>
  void run(int num_phases, Work &&work) {
    struct Call {
      static void go(void *context, Walker walker) { (*static_cast<Work *>(context))(walker); }
    };
    if (int(phases_.size()) < num_phases) phases_ = std::vector<Phase>(num_phases);
    for (int i = 0; i < num_phases; ++i) phases_[i].next.store(0, std::memory_order_relaxed), phases_[i].done.store(0, std::memory_order_relaxed);
    {
      std::lock_guard<std::mutex> guard(mutex_);
      context_ = &work;
      function_ = &Call::go;
      open_ = true;
      ++round_;
    }
    wake_.notify_all();
    function_(context_, {0, 0});
    std::unique_lock<std::mutex> guard(mutex_);
    open_ = false;  // who has not woken yet sleeps on
    left_.wait(guard, [&] { return inside_ == 0; });
  }

  // `work(i)` for every i below `total`, shared out among who is there; all are done when it returns.
  template <class Work>
  void each(Walker &walker, int total, Work &&work) {
    Phase &phase = phases_[walker.phase++];
    int mine = 0;
    for (int i = phase.next.fetch_add(1, std::memory_order_relaxed); i < total; i = phase.next.fetch_add(1, std::memory_order_relaxed)) {
      work(i);
      ++mine;
    }
    if (mine) phase.done.fetch_add(mine, std::memory_order_acq_rel);
    for (int spins = 0; phase.done.load(std::memory_order_acquire) < total; ++spins) {
      if (spins < SPINS) _mm_pause();
      else sched_yield();
    }
  }

 private:
  void serve(int id) {
    uint64_t seen = 0;
    while (true) {
      {
        std::unique_lock<std::mutex> guard(mutex_);
        wake_.wait(guard, [&] { return round_ != seen; });
        seen = round_;
        if (over_) return;
        if (!open_) continue;
        ++inside_;
      }
      function_(context_, {id, 0});
      std::lock_guard<std::mutex> guard(mutex_);
      if (--inside_ == 0) left_.notify_one();
    }
  }
  const int num_;
  std::vector<std::thread> threads_;
  std::vector<Phase> phases_;
  std::mutex mutex_;
  std::condition_variable wake_, left_;
  void *context_ = nullptr;
  void (*function_)(void *, Walker) = nullptr;
  uint64_t round_ = 0;
  int inside_ = 0;
  bool open_ = false, over_ = false;
};

struct Range {
  int begin, end;
};

Range part_of(int total, int number, int num_parts) {
  return {int(int64_t(total) * number / num_parts), int(int64_t(total) * (number + 1) / num_parts)};
}

template <class T>
class Buffer {  // grows, never shrinks, aligned to a cache line
 public:
  ~Buffer() { free(data_); }
  T *need(size_t num) {
    if (num > capacity_) {
      free(data_);
      capacity_ = num + num / 4;
      data_ = static_cast<T *>(aligned_alloc(64, (capacity_ * sizeof(T) + 63) / 64 * 64));
    }
    return data_;
  }
  T *get() const { return data_; }

 private:
  T *data_ = nullptr;
  size_t capacity_ = 0;
};

// --- numbers

inline uint16_t to_bf16(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  return uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

inline float from_bf16(uint16_t value) {
  uint32_t bits = uint32_t(value) << 16;
  float result;
  memcpy(&result, &bits, 4);
  return result;
}

inline __m512 exponential(__m512 x) {  // Cephes' polynomial, 2 ulp
  x = _mm512_max_ps(_mm512_min_ps(x, _mm512_set1_ps(88.f)), _mm512_set1_ps(-87.f));
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504088896341f)), 8);
  __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
  r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
  __m512 p = _mm512_set1_ps(1.9875691500e-4f);
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.3981999507e-3f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(8.3334519073e-3f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(4.1665795894e-2f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.6666665459e-1f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.0000001201e-1f));
  p = _mm512_fmadd_ps(p, _mm512_mul_ps(r, r), _mm512_add_ps(r, _mm512_set1_ps(1.f)));
  return _mm512_scalef_ps(p, n);
}

inline __m512 silu(__m512 gate, __m512 up) {
  const __m512 one = _mm512_set1_ps(1.f);
  const __m512 denominator = _mm512_add_ps(one, exponential(_mm512_sub_ps(_mm512_setzero_ps(), gate)));
  return _mm512_mul_ps(_mm512_div_ps(gate, denominator), up);
}

// --- the register tile: ROWS x PANEL of a product, for each kind of number

constexpr bool takes_bf16(int kind) { return kind == BF16 || kind == INT8_WEIGHT_ONLY; }
constexpr bool takes_int8(int kind) { return kind == INT8 || kind == INT4; }
constexpr size_t left_size(int kind) { return kind == F32 ? 4 : takes_bf16(kind) ? 2 : 1; }

struct Operand {  // the left side: rows of numbers, and for int8 (with int8 or int4 weights) their scales per group
  const void *data;
  ptrdiff_t stride;  // numbers per row
  const float *scale;
  const int32_t *start;  // -128 * (sum of the group): undoes the offset of the unsigned weights; int4: a float's bits, scale * sum
  ptrdiff_t groups;
  Operand row(int m, int kind) const {
    const char *bytes = static_cast<const char *>(data);
    return {bytes + m * stride * ptrdiff_t(left_size(kind)), stride, scale + m * groups, start + m * groups, groups};
  }
};

template <int ROWS>
using Accumulator = __m512[ROWS][2];

template <int ROWS>
inline __attribute__((always_inline)) void zero(Accumulator<ROWS> &sum) {
  for (int m = 0; m < ROWS; ++m) sum[m][0] = sum[m][1] = _mm512_setzero_ps();
}

template <int ROWS>
inline __attribute__((always_inline)) void tile_f32(const float *a, ptrdiff_t stride, const float *w, int k, Accumulator<ROWS> &sum) {
  for (int i = 0; i < k; ++i, w += PANEL) {
    const __m512 w0 = _mm512_loadu_ps(w), w1 = _mm512_loadu_ps(w + 16);
#pragma GCC unroll 16
    for (int m = 0; m < ROWS; ++m) {
      const __m512 x = _mm512_set1_ps(a[m * stride + i]);
      sum[m][0] = _mm512_fmadd_ps(x, w0, sum[m][0]);
      sum[m][1] = _mm512_fmadd_ps(x, w1, sum[m][1]);
    }
  }
}

inline __m512bh pair(const uint16_t *a) {
  int32_t bits;
  memcpy(&bits, a, 4);
  return (__m512bh)_mm512_set1_epi32(bits);
}

struct Halves {  // a panel's weights as they lie in bf16, two inputs per call
  const uint16_t *at;
  inline __attribute__((always_inline)) void next(__m512bh &w0, __m512bh &w1) {
    _mm_prefetch(reinterpret_cast<const char *>(at) + AHEAD, _MM_HINT_T0);
    _mm_prefetch(reinterpret_cast<const char *>(at) + AHEAD + 64, _MM_HINT_T0);
    w0 = (__m512bh)_mm512_loadu_si512(at), w1 = (__m512bh)_mm512_loadu_si512(at + 32);
    at += 2 * PANEL;
  }
};

struct Bytes {  // the same out of int8, which bf16 holds without rounding
  const int8_t *at;
  inline __attribute__((always_inline)) void next(__m512bh &w0, __m512bh &w1) {
    _mm_prefetch(reinterpret_cast<const char *>(at) + AHEAD, _MM_HINT_T0);
    w0 = _mm512_cvtne2ps_pbh(sixteen(at + 16), sixteen(at));
    w1 = _mm512_cvtne2ps_pbh(sixteen(at + 48), sixteen(at + 32));
    at += 2 * PANEL;
  }
  static inline __attribute__((always_inline)) __m512 sixteen(const int8_t *from) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i *>(from))));
  }
};

template <int ROWS, class Weights>
inline __attribute__((always_inline)) void tile_pairs(const uint16_t *a, ptrdiff_t stride, Weights weights, int k, Accumulator<ROWS> &sum) {
  for (int i = 0; i < k; i += 2) {
    __m512bh w0, w1;
    weights.next(w0, w1);
#pragma GCC unroll 16
    for (int m = 0; m < ROWS; ++m) {
      const __m512bh x = pair(a + m * stride + i);
      sum[m][0] = _mm512_dpbf16_ps(sum[m][0], x, w0);
      sum[m][1] = _mm512_dpbf16_ps(sum[m][1], x, w1);
    }
  }
}

template <int ROWS>
inline __attribute__((always_inline)) void tile_bf16(const uint16_t *a, ptrdiff_t stride, const uint16_t *w, int k, Accumulator<ROWS> &sum) {
  tile_pairs<ROWS>(a, stride, Halves{w}, k, sum);
}

template <int ROWS>
inline __attribute__((always_inline)) void tile_int8(const Operand &x, const uint8_t *w, int k, int group, Accumulator<ROWS> &sum) {
  const int8_t *a = static_cast<const int8_t *>(x.data);
  for (int g = 0; g * group < k; ++g) {
    __m512i part[ROWS][2];
#pragma GCC unroll 16
    for (int m = 0; m < ROWS; ++m) part[m][0] = part[m][1] = _mm512_set1_epi32(x.start[m * x.groups + g]);
    for (int i = g * group; i < (g + 1) * group; i += 4, w += 4 * PANEL) {
      _mm_prefetch(reinterpret_cast<const char *>(w) + AHEAD, _MM_HINT_T0);
      _mm_prefetch(reinterpret_cast<const char *>(w) + AHEAD + 64, _MM_HINT_T0);
      const __m512i w0 = _mm512_loadu_si512(w), w1 = _mm512_loadu_si512(w + 64);
#pragma GCC unroll 16
      for (int m = 0; m < ROWS; ++m) {
        int32_t four;
        memcpy(&four, a + m * x.stride + i, 4);
        const __m512i v = _mm512_set1_epi32(four);
        // not the intrinsic: GCC 12 copies every sum once more per step for it
        asm("vpdpbusd %2, %1, %0" : "+v"(part[m][0]) : "v"(w0), "v"(v));
        asm("vpdpbusd %2, %1, %0" : "+v"(part[m][1]) : "v"(w1), "v"(v));
      }
    }
#pragma GCC unroll 16
    for (int m = 0; m < ROWS; ++m) {
      const __m512 scale = _mm512_set1_ps(x.scale[m * x.groups + g]);
      sum[m][0] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(part[m][0]), scale, sum[m][0]);
      sum[m][1] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(part[m][1]), scale, sum[m][1]);
    }
  }
}

// An int4 weight is low + step * code, so a group's share is step * scale * (codes . x) + low * (scale * sum of x).
template <int ROWS>
inline __attribute__((always_inline)) void tile_int4(const Operand &x, const uint8_t *w, int k, Accumulator<ROWS> &sum) {
  const int8_t *a = static_cast<const int8_t *>(x.data);
  const __m512i low_half = _mm512_set1_epi8(15);
  for (int g = 0; g * NIBBLES < k; ++g, w += NIBBLES_BYTES) {
    __m512i part[ROWS][2];
#pragma GCC unroll 16
    for (int m = 0; m < ROWS; ++m) part[m][0] = part[m][1] = _mm512_setzero_si512();
    const uint8_t *codes = w + 4 * PANEL;
    for (int i = g * NIBBLES; i < (g + 1) * NIBBLES; i += 4, codes += 2 * PANEL) {
      _mm_prefetch(reinterpret_cast<const char *>(codes) + AHEAD, _MM_HINT_T0);
      const __m512i both = _mm512_loadu_si512(codes);
      const __m512i w0 = _mm512_and_si512(both, low_half), w1 = _mm512_and_si512(_mm512_srli_epi16(both, 4), low_half);
#pragma GCC unroll 16
      for (int m = 0; m < ROWS; ++m) {
        int32_t four;
        memcpy(&four, a + m * x.stride + i, 4);
        const __m512i v = _mm512_set1_epi32(four);
        asm("vpdpbusd %2, %1, %0" : "+v"(part[m][0]) : "v"(w0), "v"(v));
        asm("vpdpbusd %2, %1, %0" : "+v"(part[m][1]) : "v"(w1), "v"(v));
      }
    }
    const __m256i *ends = reinterpret_cast<const __m256i *>(w);
    const __m512 step0 = _mm512_cvtph_ps(_mm256_loadu_si256(ends)), step1 = _mm512_cvtph_ps(_mm256_loadu_si256(ends + 1));
    const __m512 low0 = _mm512_cvtph_ps(_mm256_loadu_si256(ends + 2)), low1 = _mm512_cvtph_ps(_mm256_loadu_si256(ends + 3));
#pragma GCC unroll 16
    for (int m = 0; m < ROWS; ++m) {
      const __m512 scale = _mm512_set1_ps(x.scale[m * x.groups + g]);
      const __m512 total = _mm512_castsi512_ps(_mm512_set1_epi32(x.start[m * x.groups + g]));
      sum[m][0] = _mm512_fmadd_ps(low0, total, _mm512_fmadd_ps(_mm512_cvtepi32_ps(part[m][0]), _mm512_mul_ps(step0, scale), sum[m][0]));
      sum[m][1] = _mm512_fmadd_ps(low1, total, _mm512_fmadd_ps(_mm512_cvtepi32_ps(part[m][1]), _mm512_mul_ps(step1, scale), sum[m][1]));
    }
  }
}

struct Sink {  // where a product's sums go; one type for all, since every further one would compile all tiles again
  enum Way { SET, ADD, GATE, PAIR } way;
  float *out;
  ptrdiff_t stride, half;  // PAIR: the second 16 columns go `half` numbers further

  void take(int row, int panel, __m512 low, __m512 high) const {
    float *to = out + row * stride + panel * (way == SET || way == ADD ? PANEL : PANEL / 2);
    if (way == GATE) return _mm512_storeu_ps(to, silu(low, high));  // a panel is 16 gates and their 16 ups
    float *next = way == PAIR ? to + half : to + PANEL / 2;
    if (way == ADD) low = _mm512_add_ps(_mm512_loadu_ps(to), low), high = _mm512_add_ps(_mm512_loadu_ps(next), high);
    _mm512_storeu_ps(to, low);
    _mm512_storeu_ps(next, high);
  }
};

template <int KIND>
constexpr int most_rows = takes_int8(KIND) ? 6 : 12;

// `weight` is the panel's; scales and bias are `linear`'s.
template <int KIND, int ROWS>
void tile(const Operand &x, const Linear &linear, const void *weight, int panel, int row, const Sink &sink) {
  Accumulator<ROWS> sum;
  zero<ROWS>(sum);
  if constexpr (KIND == F32) tile_f32<ROWS>(static_cast<const float *>(x.data), x.stride, static_cast<const float *>(weight), linear.k, sum);
  if constexpr (KIND == BF16) tile_bf16<ROWS>(static_cast<const uint16_t *>(x.data), x.stride, static_cast<const uint16_t *>(weight), linear.k, sum);
  if constexpr (KIND == INT8) tile_int8<ROWS>(x, static_cast<const uint8_t *>(weight), linear.k, linear.group, sum);
  if constexpr (KIND == INT4) tile_int4<ROWS>(x, static_cast<const uint8_t *>(weight), linear.k, sum);
  if constexpr (KIND == INT8_WEIGHT_ONLY)
    tile_pairs<ROWS>(static_cast<const uint16_t *>(x.data), x.stride, Bytes{static_cast<const int8_t *>(weight)}, linear.k, sum);
  const int column = panel * PANEL;
  if (linear.scale) {
    const __m512 s0 = _mm512_loadu_ps(linear.scale + column), s1 = _mm512_loadu_ps(linear.scale + column + 16);
    for (int m = 0; m < ROWS; ++m) sum[m][0] = _mm512_mul_ps(sum[m][0], s0), sum[m][1] = _mm512_mul_ps(sum[m][1], s1);
  }
  if (linear.bias) {
    const __m512 b0 = _mm512_loadu_ps(linear.bias + column), b1 = _mm512_loadu_ps(linear.bias + column + 16);
    for (int m = 0; m < ROWS; ++m) sum[m][0] = _mm512_add_ps(sum[m][0], b0), sum[m][1] = _mm512_add_ps(sum[m][1], b1);
  }
  for (int m = 0; m < ROWS; ++m) sink.take(row + m, panel, sum[m][0], sum[m][1]);
}

template <int KIND, int ROWS>
void tile_of(int rows, const Operand &x, const Linear &linear, const void *weight, int panel, int row, const Sink &sink) {
  if constexpr (ROWS > 0) {
    if (rows == ROWS) return tile<KIND, ROWS>(x, linear, weight, panel, row, sink);
    tile_of<KIND, ROWS - 1>(rows, x, linear, weight, panel, row, sink);
  }
}

// Rows through one panel, in tiles of nearly the same height.
template <int KIND>
void rows_of(const Operand &x, Range rows, const Linear &linear, const void *weight, int panel, const Sink &sink) {
  constexpr int most = most_rows<KIND>;
  for (int row = rows.begin; row < rows.end;) {
    const int tiles = (rows.end - row + most - 1) / most;
    const int height = (rows.end - row + tiles - 1) / tiles;
    tile_of<KIND, most>(height, x.row(row, KIND), linear, weight, panel, row, sink);
    row += height;
  }
}

const void *panel_of(const Linear &linear, int panel) {
  const size_t numbers = size_t(panel) * PANEL * linear.k;
  const char *weight = static_cast<const char *>(linear.weight);
  switch (linear.kind) {
    case F32: return weight + 4 * numbers;
    case BF16: return weight + 2 * numbers;
    case INT4: return weight + numbers / (NIBBLES * PANEL) * NIBBLES_BYTES;
    default: return weight + numbers;
  }
}

// An int8 panel as bf16; this thread's next call overwrites it.
const void *widened(const void *panel, int k) {
  static thread_local Buffer<uint16_t> wide;
  uint16_t *out = wide.need(size_t(k) * PANEL);
  Bytes weights{static_cast<const int8_t *>(panel)};
  for (int i = 0; i < k; i += 2) {
    __m512bh w0, w1;
    weights.next(w0, w1);
    _mm512_storeu_si512(out + i * PANEL, (__m512i)w0);
    _mm512_storeu_si512(out + i * PANEL + 32, (__m512i)w1);
  }
  return out;
}

template <int KIND>
void product_of(const Operand &x, int num_rows, const Linear &linear, Range panels, const Sink &sink) {
  constexpr int most = most_rows<KIND>;
  constexpr int ahead = 16 * most;  // rows whose numbers stay in the second-level cache while the panels go by
  for (int top = 0; top < num_rows; top += ahead) {
    const Range rows{top, top + ahead < num_rows ? top + ahead : num_rows};
    for (int panel = panels.begin; panel < panels.end; ++panel) {
      const void *weight = panel_of(linear, panel);
      // each of several tiles would widen the weights anew; either way the sums are the same to the last bit
      if (KIND == INT8_WEIGHT_ONLY && rows.end - rows.begin > most) rows_of<BF16>(x, rows, linear, widened(weight, linear.k), panel, sink);
      else rows_of<KIND>(x, rows, linear, weight, panel, sink);
    }
  }
}

void product(const Operand &x, int num_rows, const Linear &linear, Range panels, const Sink &sink) {
  switch (linear.kind) {
    case F32: return product_of<F32>(x, num_rows, linear, panels, sink);
    case BF16: return product_of<BF16>(x, num_rows, linear, panels, sink);
    case INT4: return product_of<INT4>(x, num_rows, linear, panels, sink);
    case INT8_WEIGHT_ONLY: return product_of<INT8_WEIGHT_ONLY>(x, num_rows, linear, panels, sink);
    default: return product_of<INT8>(x, num_rows, linear, panels, sink);
  }
}

int padded(int n) { return (n + PANEL - 1) / PANEL * PANEL; }

// --- rows of floats into the left side of a product

void quantise_group(const float *x, int num, bool offset_weights, int8_t *out, float *scale, int32_t *start) {
  __m512 largest = _mm512_setzero_ps();
  for (int i = 0; i < num; i += 16) largest = _mm512_max_ps(largest, _mm512_abs_ps(_mm512_loadu_ps(x + i)));
  const float peak = _mm512_reduce_max_ps(largest);
  const __m512 inverse = _mm512_set1_ps(peak > 0 ? 127.f / peak : 0.f);
  __m512i total = _mm512_setzero_si512();
  for (int i = 0; i < num; i += 16) {
    const __m512i rounded = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(x + i), inverse));
    total = _mm512_add_epi32(total, rounded);
    _mm_storeu_si128(reinterpret_cast<__m128i *>(out + i), _mm512_cvtsepi32_epi8(rounded));
  }
  *scale = peak / 127.f;
  const int32_t sum = _mm512_reduce_add_epi32(total);
  const float scaled = *scale * float(sum);
  if (offset_weights) *start = -128 * sum;
  else memcpy(start, &scaled, 4);
}

class Left {  // rows of floats in the form that a product takes; each product fills it anew
 public:
  void need(int num_rows, const Linear &linear) {
    bytes_.need(size_t(num_rows) * linear.k * left_size(linear.kind) + 64);
    scale_.need(size_t(num_rows) * groups(linear) + 16);
    start_.need(size_t(num_rows) * groups(linear) + 16);
  }
  void fill(const Linear &linear, int row, const float *x) {
    const int k = linear.k, num_groups = groups(linear);
    const size_t at = size_t(row) * k;
    if (linear.kind == F32) memcpy(reinterpret_cast<float *>(bytes_.get()) + at, x, size_t(k) * 4);
    if (takes_bf16(linear.kind)) {
      uint16_t *out = reinterpret_cast<uint16_t *>(bytes_.get()) + at;
      int i = 0;
      for (; i + 16 <= k; i += 16) _mm256_storeu_si256(reinterpret_cast<__m256i *>(out + i), (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(x + i)));
      for (; i < k; ++i) out[i] = to_bf16(x[i]);
    }
    if (takes_int8(linear.kind)) {
      int8_t *out = reinterpret_cast<int8_t *>(bytes_.get()) + at;
      for (int g = 0; g < num_groups; ++g) {
        const size_t slot = size_t(row) * num_groups + g;
        quantise_group(x + g * linear.group, linear.group, linear.kind == INT8, out + g * linear.group, scale_.get() + slot, start_.get() + slot);
      }
    }
  }
  Operand operand(const Linear &linear) const { return {bytes_.get(), linear.k, scale_.get(), start_.get(), groups(linear)}; }

 private:
  static int groups(const Linear &linear) { return takes_int8(linear.kind) ? linear.k / linear.group : 0; }
  Buffer<char> bytes_;
  Buffer<float> scale_;
  Buffer<int32_t> start_;
};

void rms_norm(const float *x, const float *weight, int n, float eps, float *out) {
  __m512 squares = _mm512_setzero_ps();
  int i = 0;
  for (; i + 16 <= n; i += 16) {
    const __m512 v = _mm512_loadu_ps(x + i);
    squares = _mm512_fmadd_ps(v, v, squares);
  }
  float total = _mm512_reduce_add_ps(squares);
  for (; i < n; ++i) total += x[i] * x[i];
  const float inverse = 1.f / __builtin_sqrtf(total / float(n) + eps);
  for (i = 0; i + 16 <= n; i += 16)
    _mm512_storeu_ps(out + i, _mm512_mul_ps(_mm512_mul_ps(_mm512_loadu_ps(x + i), _mm512_set1_ps(inverse)), _mm512_loadu_ps(weight + i)));
  for (; i < n; ++i) out[i] = x[i] * inverse * weight[i];
}

// --- one step

class Decoder {
 public:
  explicit Decoder(const Model &model) : model_(model), team_(model.num_threads) {
    layers_.assign(model.layers, model.layers + model.num_layers);
    scratch_.resize(team_.size());
    group_ = model.heads / model.kv_heads;
    query_tokens_ = group_ >= 12 ? 1 : 12 / group_;
  }

  // Ticks of the first thread in each part since the last call.
  void profile(uint64_t *ticks) {
    memcpy(ticks, ticks_, sizeof(ticks_));
    memset(ticks_, 0, sizeof(ticks_));
  }

  void forward(const Batch &batch) {
    const int M = batch.num_tokens;
    const Model &m = model_;
    width_ = padded(m.hidden);
    qkv_width_ = padded((m.heads + 2 * m.kv_heads) * m.head_dim);
    x_.need(size_t(M) * width_);
    normed_.need(size_t(M) * width_);
    qkv_.need(size_t(M) * qkv_width_);
    query_.need(size_t(M) * m.heads * m.head_dim);
    attended_.need(size_t(M) * m.heads * m.head_dim);
    gated_.need(size_t(M) * padded(m.ffn));
    if (batch.num_adapters) pair_.need(size_t(M) * 2 * padded(m.ffn));
    for (const Layer &w : layers_)
      for (const Linear *linear : {&w.qkv, &w.o, &w.gate_up, &w.down}) left_.need(M, *linear);
    if (batch.logits) left_.need(batch.num_outputs, m.head);
    plan(batch);
    team_.run(PHASES_AROUND + PHASES_PER_LAYER * m.num_layers, [&](Walker walker) { walk(batch, walker); });
  }

 private:
  struct Task {  // up to query_tokens_ tokens of one segment
    int32_t segment, token, num;
  };
  struct Scratch {
    Buffer<float> query, scores;
    Buffer<uint16_t> query16, weights16;
    Buffer<float> row;
  };

  void plan(const Batch &batch) {
    tasks_.clear();
    position_.resize(batch.num_tokens);
    owner_.resize(batch.num_tokens);
    for (int s = 0; s < batch.num_segments; ++s) {
      const Segment &segment = batch.segments[s];
      for (int i = 0; i < segment.num; ++i) {
        position_[segment.first + i] = segment.start + i;
        owner_[segment.first + i] = s;
      }
      for (int i = 0; i < segment.num; i += query_tokens_) {
        const int num = segment.num - i < query_tokens_ ? segment.num - i : query_tokens_;
        tasks_.push_back({s, segment.first + i, num});
      }
    }
  }

  void walk(const Batch &batch, Walker walker) {
    const int M = batch.num_tokens;
    const Model &m = model_;
    if (walker.id == 0) last_ = __builtin_ia32_rdtsc();
    rows(walker, M, [&](int row) { start_row(batch, row); });
    done(START, walker);
    for (int l = 0; l < m.num_layers; ++l) layer(batch, l, walker);
    if (batch.hidden)  // every pipeline stage hands its rows on
      rows(walker, M, [&](int row) { memcpy(batch.hidden + size_t(row) * m.hidden, x_.get() + size_t(row) * width_, size_t(m.hidden) * 4); });
    if (!batch.logits || batch.num_outputs == 0) return;
    rows(walker, batch.num_outputs, [&](int i) {
      float *row = normed_.get() + size_t(i) * width_;
      rms_norm(x_.get() + size_t(batch.outputs[i]) * width_, m.final_norm, m.hidden, m.eps, row);
      left_.fill(m.head, i, row);
    });
    multiply(walker, m.head, batch.num_outputs, {Sink::SET, batch.logits, padded(m.vocab), 0});
    done(HEAD, walker);
  }

  // `work(row)` for all rows, a few neighbours at a time.
  template <class Work>
  void rows(Walker &walker, int num_rows, Work &&work) {
    const int most = 4 * team_.size(), parts = num_rows < most ? num_rows : most;
    team_.each(walker, parts, [&](int part) {
      const Range range = part_of(num_rows, part, parts);
      for (int row = range.begin; row < range.end; ++row) work(row);
    });
  }

  // The product of what `left_` holds for `linear`.
  void multiply(Walker &walker, const Linear &linear, int num_rows, const Sink &sink) {
    const int panels = (linear.n + PANEL - 1) / PANEL, most = 32 * team_.size(), parts = panels < most ? panels : most;
    const Operand left = left_.operand(linear);
    team_.each(walker, parts, [&](int part) { product(left, num_rows, linear, part_of(panels, part, parts), sink); });
  }

  void start_row(const Batch &batch, int row) {
    float *out = x_.get() + size_t(row) * width_;
    const int n = model_.hidden;
    memset(out, 0, size_t(width_) * 4);
    if (!batch.ids) {
      memcpy(out, batch.hidden + size_t(row) * n, size_t(n) * 4);
    } else if (!model_.embedding) {
      head_row(batch.ids[row], out);
    } else if (model_.embedding_kind == F32) {
      memcpy(out, static_cast<const float *>(model_.embedding) + size_t(batch.ids[row]) * n, size_t(n) * 4);
    } else {
      const uint16_t *in = static_cast<const uint16_t *>(model_.embedding) + size_t(batch.ids[row]) * n;
      for (int i = 0; i < n; ++i) out[i] = from_bf16(in[i]);
    }
  }

  void head_row(int id, float *out) {
    const int n = model_.hidden, column = id % PANEL;
    const size_t panel = size_t(id / PANEL) * PANEL * n;
    const float *wide = static_cast<const float *>(model_.head.weight) + panel;
    const uint16_t *narrow = static_cast<const uint16_t *>(model_.head.weight) + panel;
    if (model_.head.kind == F32)
      for (int i = 0; i < n; ++i) out[i] = wide[size_t(i) * PANEL + column];
    else
      for (int i = 0; i < n; ++i) out[i] = from_bf16(narrow[size_t(i / 2) * 2 * PANEL + 2 * column + i % 2]);
  }

  void layer(const Batch &batch, int l, Walker &walker) {
    const int M = batch.num_tokens;
    const Model &m = model_;
    const Layer &w = layers_[l];
    const int attended = m.heads * m.head_dim, gated = padded(m.ffn);
    enter(walker, w.qkv, w.input_norm, M);
    multiply(walker, w.qkv, M, {Sink::SET, qkv_.get(), qkv_width_, 0});
    if (batch.num_adapters) adapt(walker, batch, l, 0, 3, normed_.get(), width_, qkv_.get(), qkv_width_);
    done(QKV, walker);
    rows(walker, M, [&](int row) { rotate(batch, w, row, walker.id); });
    done(ROTATE, walker);
    team_.each(walker, int(tasks_.size()) * m.kv_heads, [&](int task) {
      const Task &t = tasks_[task / m.kv_heads];
      if (m.kv_kind == F32) attend<F32>(batch, w, t, task % m.kv_heads, scratch_[walker.id]);
      else attend<BF16>(batch, w, t, task % m.kv_heads, scratch_[walker.id]);
    });
    done(ATTENTION, walker);
    rows(walker, M, [&](int row) { left_.fill(w.o, row, attended_.get() + size_t(row) * attended); });
    add(walker, w.o, M);
    if (batch.num_adapters) adapt(walker, batch, l, 3, 1, attended_.get(), attended, x_.get(), width_);
    done(OUTPUT, walker);
    enter(walker, w.gate_up, w.post_norm, M);
    if (batch.num_adapters) gate_adapted(walker, batch, l, w);
    else multiply(walker, w.gate_up, M, {Sink::GATE, gated_.get(), gated, 0});
    done(GATE_UP, walker);
    rows(walker, M, [&](int row) { left_.fill(w.down, row, gated_.get() + size_t(row) * gated); });
    add(walker, w.down, M);
    if (batch.num_adapters) adapt(walker, batch, l, 6, 1, gated_.get(), gated, x_.get(), width_);
    done(DOWN, walker);
  }

  // Normalises the rows into the left side of `linear`.
  void enter(Walker &walker, const Linear &linear, const float *norm, int M) {
    rows(walker, M, [&](int row) {
      float *out = normed_.get() + size_t(row) * width_;
      rms_norm(x_.get() + size_t(row) * width_, norm, model_.hidden, model_.eps, out);
      left_.fill(linear, row, out);
    });
    done(NORM, walker);
  }

  // The product is added to the residual stream.
  void add(Walker &walker, const Linear &linear, int M) { multiply(walker, linear, M, {Sink::ADD, x_.get(), width_, 0}); }

  // gate and up with the adapters' share, then silu
  void gate_adapted(Walker &walker, const Batch &batch, int l, const Layer &w) {
    const int M = batch.num_tokens, half = padded(model_.ffn), width = 2 * half;
    multiply(walker, w.gate_up, M, {Sink::PAIR, pair_.get(), width, half});
    adapt(walker, batch, l, 4, 2, normed_.get(), width_, pair_.get(), width);
    rows(walker, M, [&](int row) {
      const float *in = pair_.get() + size_t(row) * width;
      float *out = gated_.get() + size_t(row) * half;
      for (int i = 0; i < half; i += 16) _mm512_storeu_ps(out + i, silu(_mm512_loadu_ps(in + i), _mm512_loadu_ps(in + half + i)));
    });
  }

  // Low-rank updates of `count` projections from number `first` on.
  void adapt(Walker &walker, const Batch &batch, int l, int first, int count, const float *in, int in_width, float *out, int out_width) {
    rows(walker, batch.num_tokens, [&](int row) {
      const int adapter = batch.segments[owner_[row]].adapter;
      if (adapter < 0) return;
      for (int p = first; p < first + count; ++p) {
        const Lora &lora = batch.loras[(size_t(adapter) * model_.num_layers + l) * 7 + p];
        if (lora.rank) adapt_row(lora, in + size_t(row) * in_width, out + size_t(row) * out_width + lora.offset);
      }
    });
  }

  static void adapt_row(const Lora &lora, const float *x, float *y) {
    for (int r = 0; r < lora.rank; ++r) {
      const float *a = lora.a + size_t(r) * lora.k, *b = lora.b + size_t(r) * lora.n;
      __m512 dot = _mm512_setzero_ps();
      int i = 0;
      for (; i + 16 <= lora.k; i += 16) dot = _mm512_fmadd_ps(_mm512_loadu_ps(a + i), _mm512_loadu_ps(x + i), dot);
      float low = _mm512_reduce_add_ps(dot);
      for (; i < lora.k; ++i) low += a[i] * x[i];
      for (i = 0; i + 16 <= lora.n; i += 16) _mm512_storeu_ps(y + i, _mm512_fmadd_ps(_mm512_set1_ps(low), _mm512_loadu_ps(b + i), _mm512_loadu_ps(y + i)));
      for (; i < lora.n; ++i) y[i] += low * b[i];
    }
  }

  // Rotary positions on queries and keys; keys and values go into their block.
  void rotate(const Batch &batch, const Layer &w, int row, int id) {
    const Model &m = model_;
    const int D = m.head_dim, half = D / 2, position = position_[row];
    float *in = qkv_.get() + size_t(row) * qkv_width_;
    const float *cosine = m.cosine + size_t(position) * half, *sine = m.sine + size_t(position) * half;
    float *turned = scratch_[id].row.need(D);
    for (int h = 0; h < m.heads; ++h) {
      turn(in + h * D, w.q_norm, cosine, sine, turned);
      float *out = query_.get() + (size_t(row) * m.heads + h) * D;
      for (int d = 0; d < D; ++d) out[d] = turned[d] * m.scale;
    }
    const Segment &segment = batch.segments[owner_[row]];
    const int32_t block = batch.tables[size_t(segment.table) * batch.max_blocks + position / BLOCK];
    const int j = position % BLOCK;
    const float *keys = in + m.heads * D, *values = keys + m.kv_heads * D;
    for (int h = 0; h < m.kv_heads; ++h) {
      const size_t at = (size_t(block) * m.kv_heads + h) * size_t(D) * BLOCK;
      turn(keys + h * D, w.k_norm, cosine, sine, turned);
      if (m.kv_kind == F32) store_f32(static_cast<float *>(w.keys) + at, static_cast<float *>(w.values) + at, j, turned, values + h * D);
      else store_bf16(static_cast<uint16_t *>(w.keys) + at, static_cast<uint16_t *>(w.values) + at, j, turned, values + h * D);
    }
  }

  void turn(const float *x, const float *norm, const float *cosine, const float *sine, float *out) {
    const int half = model_.head_dim / 2;
    float scaled[512];
    if (norm) {
      rms_norm(x, norm, model_.head_dim, model_.eps, scaled);
      x = scaled;
    }
    for (int d = 0; d < half; ++d) {
      out[d] = x[d] * cosine[d] - x[d + half] * sine[d];
      out[d + half] = x[d + half] * cosine[d] + x[d] * sine[d];
    }
  }

  void store_f32(float *keys, float *values, int j, const float *key, const float *value) {
    for (int d = 0; d < model_.head_dim; ++d) {
      keys[d * BLOCK + j] = key[d];
      values[(d / PANEL) * BLOCK * PANEL + j * PANEL + d % PANEL] = value[d];
    }
  }

  void store_bf16(uint16_t *keys, uint16_t *values, int j, const float *key, const float *value) {
    for (int d = 0; d < model_.head_dim; ++d) {
      keys[(d / 2) * 2 * BLOCK + 2 * j + d % 2] = to_bf16(key[d]);
      values[(d / PANEL) * BLOCK * PANEL + (j / 2) * 2 * PANEL + (d % PANEL) * 2 + j % 2] = to_bf16(value[d]);
    }
  }

  // One key head's queries of a few neighbouring tokens: scores over all blocks, softmax, weighted values.
  template <int KV>
  void attend(const Batch &batch, const Layer &w, const Task &task, int kv_head, Scratch &scratch) {
    const Model &m = model_;
    const int D = m.head_dim;
    const Segment &segment = batch.segments[task.segment];
    const int32_t *table = batch.tables + size_t(segment.table) * batch.max_blocks;
    const int longest = position_[task.token + task.num - 1] + 1;
    const int num_blocks = (longest + BLOCK - 1) / BLOCK, width = num_blocks * BLOCK;
    const int most = 12 < group_ ? 12 : group_;  // heads in one tile
    for (int g = 0; g < group_; g += most) {
      const int heads = group_ - g < most ? group_ - g : most, rows = task.num * heads;
      float *query = scratch.query.need(size_t(rows) * D);
      for (int t = 0; t < task.num; ++t)
        memcpy(query + size_t(t) * heads * D, query_.get() + (size_t(task.token + t) * m.heads + kv_head * group_ + g) * D, size_t(heads) * D * 4);
      const void *left = query;
      if constexpr (KV == BF16) left = narrow(query, scratch.query16.need(size_t(rows) * D), rows * D);
      float *scores = scratch.scores.need(size_t(rows) * width);
      for (int b = 0; b < num_blocks; ++b) {
        const size_t at = (size_t(table[b]) * m.kv_heads + kv_head) * size_t(D) * BLOCK;
        score_of<KV, 12>(rows, left, D, w.keys, at, scores + b * BLOCK, width);
      }
      for (int r = 0; r < rows; ++r) softmax(scores + size_t(r) * width, position_[task.token + r / heads] + 1, width);
      const void *weights = scores;
      if constexpr (KV == BF16) weights = narrow(scores, scratch.weights16.need(size_t(rows) * width), rows * width);
      for (int panel = 0; panel < D / PANEL; ++panel) {
        float *out = query + panel * PANEL;  // the queries are used up: their room takes the result
        value_of<KV, 12>(rows, weights, width, w.values, table, num_blocks, kv_head, panel, out);
      }
      for (int t = 0; t < task.num; ++t)
        memcpy(attended_.get() + (size_t(task.token + t) * m.heads + kv_head * group_ + g) * D, query + size_t(t) * heads * D, size_t(heads) * D * 4);
    }
  }

  static const uint16_t *narrow(const float *in, uint16_t *out, int num) {  // num is a multiple of 32
    for (int i = 0; i < num; i += 16) _mm256_storeu_si256(reinterpret_cast<__m256i *>(out + i), (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(in + i)));
    return out;
  }

  template <int KV, int ROWS>
  static void score_of(int rows, const void *left, int D, const void *keys, size_t at, float *out, int width) {
    if constexpr (ROWS > 0) {
      if (rows != ROWS) return score_of<KV, ROWS - 1>(rows, left, D, keys, at, out, width);
      Accumulator<ROWS> sum;
      zero<ROWS>(sum);
      if constexpr (KV == F32) tile_f32<ROWS>(static_cast<const float *>(left), D, static_cast<const float *>(keys) + at, D, sum);
      else tile_bf16<ROWS>(static_cast<const uint16_t *>(left), D, static_cast<const uint16_t *>(keys) + at, D, sum);
      for (int m = 0; m < ROWS; ++m) {
        _mm512_storeu_ps(out + size_t(m) * width, sum[m][0]);
        _mm512_storeu_ps(out + size_t(m) * width + 16, sum[m][1]);
      }
    }
  }

  template <int KV, int ROWS>
  void value_of(int rows, const void *weights, int width, const void *values, const int32_t *table, int num_blocks, int kv_head, int panel, float *out) {
    if constexpr (ROWS > 0) {
      if (rows != ROWS) return value_of<KV, ROWS - 1>(rows, weights, width, values, table, num_blocks, kv_head, panel, out);
      const int D = model_.head_dim;
      Accumulator<ROWS> sum;
      zero<ROWS>(sum);
      for (int b = 0; b < num_blocks; ++b) {
        const size_t at = (size_t(table[b]) * model_.kv_heads + kv_head) * size_t(D) * BLOCK + size_t(panel) * BLOCK * PANEL;
        if constexpr (KV == F32) tile_f32<ROWS>(static_cast<const float *>(weights) + b * BLOCK, width, static_cast<const float *>(values) + at, BLOCK, sum);
        else tile_bf16<ROWS>(static_cast<const uint16_t *>(weights) + b * BLOCK, width, static_cast<const uint16_t *>(values) + at, BLOCK, sum);
      }
      for (int m = 0; m < ROWS; ++m) {
        _mm512_storeu_ps(out + size_t(m) * D, sum[m][0]);
        _mm512_storeu_ps(out + size_t(m) * D + 16, sum[m][1]);
      }
    }
  }

  // In place over the first `length` scores; the rest becomes zero.
  static void softmax(float *scores, int length, int width) {
    __m512 largest = _mm512_set1_ps(-__builtin_inff());
    for (int i = 0; i < length; i += 16) {
      const __mmask16 inside = length - i >= 16 ? 0xffff : __mmask16((1u << (length - i)) - 1);
      largest = _mm512_mask_max_ps(largest, inside, largest, _mm512_loadu_ps(scores + i));
    }
    const __m512 peak = _mm512_set1_ps(_mm512_reduce_max_ps(largest));
    __m512 total = _mm512_setzero_ps();
    for (int i = 0; i < width; i += 16) {
      const int left = length - i;
      const __mmask16 inside = left >= 16 ? 0xffff : left <= 0 ? 0 : __mmask16((1u << left) - 1);
      const __m512 v = _mm512_maskz_mov_ps(inside, exponential(_mm512_sub_ps(_mm512_loadu_ps(scores + i), peak)));
      total = _mm512_add_ps(total, v);
      _mm512_storeu_ps(scores + i, v);
    }
    const __m512 inverse = _mm512_set1_ps(1.f / _mm512_reduce_add_ps(total));
    for (int i = 0; i < width; i += 16) _mm512_storeu_ps(scores + i, _mm512_mul_ps(_mm512_loadu_ps(scores + i), inverse));
  }

  void done(Part part, const Walker &walker) {
    if (walker.id != 0) return;
    const uint64_t now = __builtin_ia32_rdtsc();
    ticks_[part] += now - last_;
    last_ = now;
  }

  const Model model_;
  Team team_;
  uint64_t ticks_[NUM_PARTS] = {}, last_ = 0;
  std::vector<Layer> layers_;
  std::vector<Scratch> scratch_;
  std::vector<Task> tasks_;
  std::vector<int32_t> position_, owner_;
  int group_, query_tokens_, width_ = 0, qkv_width_ = 0;
  Left left_;
  Buffer<float> x_, normed_, qkv_, query_, attended_, gated_, pair_;
};

}  // namespace

extern "C" {

int32_t r1ray_abi() { return ABI; }
int32_t r1ray_struct_sizes(int32_t *sizes) {
  const int32_t all[] = {sizeof(Linear), sizeof(Lora), sizeof(Layer), sizeof(Model), sizeof(Segment), sizeof(Batch)};
  memcpy(sizes, all, sizeof(all));
  return 6;
}
void *r1ray_create(const Model *model) { return new Decoder(*model); }
void r1ray_forward(void *decoder, const Batch *batch) { static_cast<Decoder *>(decoder)->forward(*batch); }
void r1ray_profile(void *decoder, uint64_t *ticks) { static_cast<Decoder *>(decoder)->profile(ticks); }
void r1ray_destroy(void *decoder) { delete static_cast<Decoder *>(decoder); }
}
