/* Many steps of a cell whose channels mix by products with weights and by sums, the same for all such
   cells. Before this stand the counts of what a step is computed from; tables that say which products
   and reductions there are on which level (what needs none, what needs those of the level before, and
   so on); and two functions of a row: `factors`, which computes what is multiplied or reduced on one
   level, and `new_state`.

   A part of the work is a block of rows, which are chunks of sequences, and one group of channels: a
   head, or all of them. Its rows go through time together, so that a weight that was read is used
   for all of them. */

#ifdef __SSE__
#include <xmmintrin.h>
/* Where asked, numbers too small for the format count as zero meanwhile: adjoints of steps long
   before a loss fall that low, and some processors take a hundred times as long for each. */
#define WITHOUT_TINY_NUMBERS(asked) \
  const unsigned mode = _mm_getcsr(); \
  if (asked) _mm_setcsr(mode | 0x8040);
#define AS_BEFORE _mm_setcsr(mode);
#else
#define WITHOUT_TINY_NUMBERS(asked)
#define AS_BEFORE
#endif

#ifdef __AVX512F__
#define VECTOR_BYTES 64
#else
#define VECTOR_BYTES 32
#endif
enum { LANES = VECTOR_BYTES / sizeof(real), ROWS = 8 };
enum { VECTORS = WIDTH / LANES % 2 ? 1 : 2 };

typedef real vector __attribute__((vector_size(VECTOR_BYTES), aligned(sizeof(real)), may_alias));

typedef struct {
  const real *data; /* (batch, time, ...), from the first channel of the first group */
  int64_t batch_stride, time_stride, group_stride, channel_stride;
  int64_t lanes, parts, part_stride; /* parts that lie apart; zero beyond them */
} drive_input;

typedef struct {
  real *data; /* (batch, time, hidden), or no address */
  int64_t batch_stride, time_stride;
} over_time;

typedef struct {
  int64_t rows, distinct, batch, time, chunk, first, reverse, flushes, threads;
  const uint8_t *settled; /* (batch,): sequences that are left as they are; or no address */
  const uint8_t *resets;  /* (batch, time): where the state before a step is replaced; or none */
  int64_t reset_batch_stride, reset_time_stride;
  const real *weights;      /* (WEIGHTS, GROUPS, SIZE of the factor, WIDTH of the result) */
  const real *coefficients; /* (COEFFICIENTS, GROUPS, SIZE) */
  drive_input drives[DRIVES];
  over_time states[COMPONENTS], reset_states[COMPONENTS];
  const real *initial[COMPONENTS]; /* (rows, hidden) */
  real *ends[COMPONENTS];
} sweep_arguments;

typedef real row_values[ROWS][WIDTH];

#define EACH(i, count) for (int i = 0; i < count; i++)

/* Of a product: its number, that of its vector, the weight; and the results and multiplied channels
   of each of so many blocks on the diagonal of the weight, which is zero elsewhere. */
enum { NUMBER, FROM, WEIGHT, BLOCK_RESULTS, BLOCK_LANES, BLOCKS, DOT_FIELDS };

/* out[r][j] = sum over k of x[r][k] w[k][j], for `rows` rows; a constant where it is called. */
INLINE void multiply_rows(
    int rows, const int *product, const row_values x, const real *w, row_values out) {
  const int results = product[BLOCK_RESULTS], lanes = product[BLOCK_LANES];
  for (int j = 0; j < WIDTH; j += VECTORS * LANES) {
    const int block = j / results, behind = (j + VECTORS * LANES - 1) / results + 1;
    const int last = (behind < product[BLOCKS] ? behind : product[BLOCKS]) * lanes;
    vector sum[ROWS][VECTORS];
#pragma GCC unroll 8
    EACH(r, rows)
#pragma GCC unroll 2
      EACH(v, VECTORS) sum[r][v] = (vector){0};
    for (int k = block * lanes; k < last; k++) {
      vector column[VECTORS];
#pragma GCC unroll 2
      EACH(v, VECTORS) column[v] = *(const vector *)(w + (int64_t)k * WIDTH + j + v * LANES);
#pragma GCC unroll 8
      EACH(r, rows)
#pragma GCC unroll 2
        EACH(v, VECTORS) sum[r][v] += x[r][k] * column[v];
    }
#pragma GCC unroll 8
    EACH(r, rows)
#pragma GCC unroll 2
      EACH(v, VECTORS) *(vector *)(out[r] + j + v * LANES) = sum[r][v];
  }
}

static void multiply(
    int rows, const int *product, const row_values x, const real *w, row_values out) {
  if (rows > 4) multiply_rows(8, product, x, w, out);
  else if (rows > 2) multiply_rows(4, product, x, w, out);
  else if (rows > 1) multiply_rows(2, product, x, w, out);
  else multiply_rows(1, product, x, w, out);
}

/* Kinds of reductions, as tables have them; an extreme of numbers one of which is none is none. */
enum { SUM, MAX, MIN };
static real reduced(int kind, const real *x, int lanes) {
  real found = kind == SUM ? C(0) : x[0];
  if (kind == SUM) {
#pragma omp simd reduction(+ : found)
    EACH(d, lanes) found += x[d];
    return found;
  }
  EACH(d, lanes) {
    const int better = kind == MAX ? x[d] > found : x[d] < found;
    found = better || x[d] != x[d] ? x[d] : found;
  }
  return found;
}

/* Of a reduction: its number, that of its vector, the kind, lanes of a part; and of parts of a
   vector, lanes that each result is handed to and how many parts there are. */
enum { KIND = WEIGHT, PART_LANES, PART_RESULTS, PARTS, PART_FIELDS, TOTAL_FIELDS = PART_RESULTS };

static void reduce_parts(const int *part, const real *x, real *out) {
  EACH(p, part[PARTS]) {
    const real found = reduced(part[KIND], x + p * part[PART_LANES], part[PART_LANES]);
    EACH(d, part[PART_RESULTS]) out[p * part[PART_RESULTS] + d] = found;
  }
}

/* Where a row is in its sequence: `steps` steps, the first at `position`. */
typedef struct {
  int64_t sequence, position, steps;
} place;

static place place_of(const sweep_arguments *a, int64_t row) {
  const int64_t own = row % a->distinct, begin = own / a->batch * a->chunk;
  const int64_t left = a->time - begin, count = left < a->chunk ? left : a->chunk;
  const int64_t skipped = a->first < count - 1 ? a->first : count - 1;
  place p = {.sequence = own % a->batch, .position = begin + skipped, .steps = count - skipped};
  if (a->reverse) p.position = begin + count - 1, p.steps = count;
  if (a->settled && a->settled[p.sequence]) p.steps = 0;
  return p;
}

static void block_of_rows(const void *arguments, int64_t index) {
  const sweep_arguments *a = arguments;
  const int64_t group = index % GROUPS, row0 = index / GROUPS * ROWS, hidden = GROUPS * SIZE;
  const int n = a->rows - row0 < ROWS ? (int)(a->rows - row0) : ROWS;
  enum { KEPT = COMPONENTS + DRIVES + FACTORS + PRODUCTS };
  row_values *kept = calloc(KEPT, sizeof(row_values));
  row_values *state = kept, *copied = state + COMPONENTS, *factor = copied + DRIVES;
  row_values *product = factor + FACTORS;
  real total[ROWS][TOTALS + 1];
  place places[ROWS];
  const real *coefficient[COEFFICIENTS + 1], *drive[ROWS][DRIVES];
  int64_t longest = 0;
  WITHOUT_TINY_NUMBERS(a->flushes)
  EACH(c, COEFFICIENTS) coefficient[c] = a->coefficients + (c * GROUPS + group) * SIZE;
  EACH(r, n) {
    places[r] = place_of(a, row0 + r);
    longest = places[r].steps > longest ? places[r].steps : longest;
    EACH(i, COMPONENTS)
      memcpy(state[i][r], a->initial[i] + (row0 + r) * hidden + group * SIZE, SIZE * sizeof(real));
  }
  for (int64_t t = 0; t < longest; t++) {
    int64_t at[ROWS];
    EACH(r, n) {
      const place p = places[r];
      const int64_t own = t < p.steps ? t : p.steps > 0 ? p.steps - 1 : 0;
      at[r] = a->reverse ? p.position - own : p.position + own;
      if (a->resets && t < p.steps
          && a->resets[p.sequence * a->reset_batch_stride + at[r] * a->reset_time_stride])
        EACH(i, COMPONENTS) {
          const over_time *f = &a->reset_states[i];
          const int64_t from = p.sequence * f->batch_stride + at[r] * f->time_stride;
          memcpy(state[i][r], f->data + from + group * SIZE, SIZE * sizeof(real));
        }
      EACH(m, DRIVES) {
        const drive_input *f = &a->drives[m];
        const real *from = f->data + p.sequence * f->batch_stride + at[r] * f->time_stride
                           + group * f->group_stride;
        if (f->channel_stride == 1 && f->lanes == SIZE) {
          drive[r][m] = from;
          continue;
        }
        EACH(p, f->parts)
          EACH(d, f->lanes)
            copied[m][r][p * f->lanes + d] = from[p * f->part_stride + d * f->channel_stride];
        drive[r][m] = copied[m][r];
      }
    }
#define POINTERS(name, count, of) \
  real *name[count + 1];          \
  EACH(i, count) name[i] = of[i][r];
    for (int level = 0; level < LEVELS; level++) {
      EACH(r, n) {
        POINTERS(s, COMPONENTS, state)
        POINTERS(x, FACTORS, factor)
        POINTERS(y, PRODUCTS, product)
        factors(level, (inputs)s, drive[r], coefficient, (inputs)y, total[r], x);
        for (int i = FIRST_TOTAL[level]; i < FIRST_TOTAL[level + 1]; i++) {
          const int *of = TOTAL + i * TOTAL_FIELDS;
          total[r][of[NUMBER]] = reduced(of[KIND], x[of[FROM]], of[PART_LANES]);
        }
        for (int i = FIRST_PART[level]; i < FIRST_PART[level + 1]; i++) {
          const int *of = PART + i * PART_FIELDS;
          reduce_parts(of, x[of[FROM]], y[of[NUMBER]]);
        }
      }
      for (int i = FIRST_DOT[level]; i < FIRST_DOT[level + 1]; i++) {
        const int *of = DOT + i * DOT_FIELDS;
        multiply(n, of, factor[of[FROM]],
                 a->weights + (of[WEIGHT] * GROUPS + group) * (int64_t)SIZE * WIDTH,
                 product[of[NUMBER]]);
      }
    }
    EACH(r, n) {
      POINTERS(s, COMPONENTS, state)
      POINTERS(y, PRODUCTS, product)
      if (t >= places[r].steps) continue;
      new_state((inputs)s, drive[r], coefficient, (inputs)y, total[r], s);
      EACH(i, COMPONENTS) {
        const over_time *f = &a->states[i];
        if (!f->data) continue;
        real *to = f->data + places[r].sequence * f->batch_stride + at[r] * f->time_stride;
        memcpy(to + group * SIZE, s[i], SIZE * sizeof(real));
      }
    }
  }
  EACH(r, n) EACH(i, COMPONENTS)
    memcpy(a->ends[i] + (row0 + r) * hidden + group * SIZE, state[i][r], SIZE * sizeof(real));
  AS_BEFORE
  free(kept);
}

void sweep(const int64_t *arguments) {
  const sweep_arguments *a = (const void *)arguments;
  share(block_of_rows, a, (a->rows + ROWS - 1) / ROWS * GROUPS, a->threads);
}
