/* The loops over the times and channels of chunks, the same for all cells: `forward`, `tangent` and
   `backward`. Before this stand the counts of what a step is computed from, and three functions of
   one channel d: `step`, `step_with_tangent` and `step_adjoint`.

   The arguments come as one array of 64-bit numbers, which the structs give names to. A state has
   the shape (batch, time, hidden), what is kept beside chunks (batch, chunks, count, hidden). */

_Static_assert(sizeof(void *) == sizeof(int64_t), "addresses are passed as 64-bit numbers");

typedef struct {
  real *data; /* (batch, time, hidden) */
  int64_t batch_stride, time_stride;
} sequence;

typedef struct {
  int64_t batch, time, hidden, chunks, chunk, block, threads, rows, limit;
  const int32_t *starts; /* (batch, time): the initial state from which a sequence starts, or -1 */
  sequence drives[DRIVES];
  const real *coefficients[COEFFICIENTS];
} problem;

typedef struct {
  problem problem;
  const real *initial, *boundary;
  real *ends, *states[COMPONENTS]; /* or no states */
} forward_arguments;

typedef struct {
  problem problem;
  const real *initial, *boundary;
  real *tangents;
} tangent_arguments;

typedef struct {
  problem problem;
  const real *initial, *incoming;
  real *outgoing, *grad_initial;
  double *grad_coefficients;
  const real *states[COMPONENTS], *grad_states[COMPONENTS];
  sequence grad_drives[DRIVES];
} backward_arguments;

#define EACH(i, count) for (int i = 0; i < count; i++)
#define CHANNELS(d, l) for (int64_t d = 0; d < l.n; d++)

/* What one call computes: channels d0 to d0 + n of row b, times t0 to t1, which are chunk k. */
typedef struct {
  int64_t b, k, d0, n, t0, t1;
} lane;

static int64_t blocks(const problem *p) { return (p->hidden + p->block - 1) / p->block; }

static lane lane_of(const problem *p, int64_t index) {
  lane l = {.d0 = index % blocks(p) * p->block, .k = index / blocks(p) % p->chunks};
  l.b = index / blocks(p) / p->chunks;
  l.n = p->hidden - l.d0 < p->block ? p->hidden - l.d0 : p->block;
  l.t0 = l.k * p->chunk;
  l.t1 = l.t0 + p->chunk < p->time ? l.t0 + p->chunk : p->time;
  return l;
}

/* Where entry i of `count` is that a chunk has beside it. */
INLINE int64_t beside(const problem *p, lane l, int count, int i) {
  return ((l.b * p->chunks + l.k) * count + i) * p->hidden + l.d0;
}

INLINE int64_t in_states(const problem *p, lane l, int64_t t) {
  return (l.b * p->time + t) * p->hidden + l.d0;
}

INLINE real *at_time(sequence x, lane l, int64_t t) {
  return x.data + l.b * x.batch_stride + t * x.time_stride + l.d0;
}

INLINE const real *initial_state(const problem *p, const real *initial, lane l, int32_t start, int i) {
  return initial + ((int64_t)start * COMPONENTS + i) * p->hidden + l.d0;
}

/* Where a sequence starts, the state is its initial one; whether it does. */
INLINE int restart(const problem *p, const real *initial, lane l, int64_t t, const real **state) {
  const int32_t start = p->starts ? p->starts[l.b * p->time + t] : -1;
  if (start >= 0) EACH(i, COMPONENTS) state[i] = initial_state(p, initial, l, start, i);
  return start >= 0;
}

/* states[t] and the state after each chunk, from the state before it. */
static void forward_lane(const void *arguments, int64_t index) {
  const forward_arguments *a = arguments;
  const problem *p = &a->problem;
  const lane l = lane_of(p, index);
  real unwanted[COMPONENTS][MAX_BLOCK], *next[COMPONENTS];
  const real *state[COMPONENTS], *drive[DRIVES], *coefficient[COEFFICIENTS];
  EACH(i, COMPONENTS) state[i] = a->boundary + beside(p, l, COMPONENTS, i);
  EACH(c, COEFFICIENTS) coefficient[c] = p->coefficients[c] + l.d0;
  for (int64_t t = l.t0 > l.t1 - p->limit ? l.t0 : l.t1 - p->limit; t < l.t1; t++) {
    restart(p, a->initial, l, t, state);
    EACH(m, DRIVES) drive[m] = at_time(p->drives[m], l, t);
    EACH(i, COMPONENTS) next[i] = a->states[i] ? a->states[i] + in_states(p, l, t) : unwanted[i];
#pragma omp simd
    CHANNELS(d, l) step(d, state, drive, coefficient, next);
    EACH(i, COMPONENTS) state[i] = next[i];
  }
  EACH(i, COMPONENTS) memcpy(a->ends + beside(p, l, COMPONENTS, i), state[i], l.n * sizeof(real));
}

/* The derivative of the state after each chunk in the state before it. */
static void tangent_lane(const void *arguments, int64_t index) {
  const tangent_arguments *a = arguments;
  const problem *p = &a->problem;
  const lane l = lane_of(p, index);
  real after[COMPONENTS][MAX_BLOCK], tangent[COMPONENTS * COMPONENTS][MAX_BLOCK];
  real *next[COMPONENTS];
  const real *state[COMPONENTS], *drive[DRIVES], *coefficient[COEFFICIENTS];
  EACH(i, COMPONENTS) state[i] = a->boundary + beside(p, l, COMPONENTS, i);
  EACH(i, COMPONENTS) next[i] = after[i];
  EACH(c, COEFFICIENTS) coefficient[c] = p->coefficients[c] + l.d0;
  EACH(i, COMPONENTS) EACH(j, COMPONENTS) CHANNELS(d, l) tangent[i * COMPONENTS + j][d] = i == j;
  for (int64_t t = l.t0; t < l.t1; t++) {
    if (restart(p, a->initial, l, t, state)) memset(tangent, 0, sizeof tangent);
    EACH(m, DRIVES) drive[m] = at_time(p->drives[m], l, t);
#pragma omp simd
    CHANNELS(d, l) step_with_tangent(d, state, drive, coefficient, next, tangent);
    EACH(i, COMPONENTS) state[i] = next[i];
  }
  EACH(e, COMPONENTS * COMPONENTS)
    memcpy(a->tangents + beside(p, l, COMPONENTS * COMPONENTS, e), tangent[e], l.n * sizeof(real));
}

/* Adjoint of a chunk: gradients of what went in, from the adjoint of its last state. */
static void backward_lane(const void *arguments, int64_t index) {
  const backward_arguments *a = arguments;
  const problem *p = &a->problem;
  const lane l = lane_of(p, index);
  real adjoint[COMPONENTS][MAX_BLOCK], zeros[MAX_BLOCK] = {0}, unwanted[MAX_BLOCK];
  double total[COEFFICIENTS][MAX_BLOCK];
  real *grad_drive[DRIVES];
  const real *state[COMPONENTS], *drive[DRIVES], *coefficient[COEFFICIENTS], *gradient[COMPONENTS];
  EACH(i, COMPONENTS)
    memcpy(adjoint[i], a->incoming + beside(p, l, COMPONENTS, i), l.n * sizeof(real));
  EACH(c, COEFFICIENTS) coefficient[c] = p->coefficients[c] + l.d0;
  EACH(c, COEFFICIENTS) memset(total[c], 0, l.n * sizeof(double));
  const int64_t end = l.t1 - l.t0 < p->limit ? l.t1 : l.t0 + p->limit;
  for (int64_t t = end - 1; t >= l.t0; t--) {
    const int64_t at = in_states(p, l, t);
    const int32_t start = p->starts ? p->starts[l.b * p->time + t] : t == 0 ? (int32_t)l.b : -1;
    EACH(i, COMPONENTS) {
      const real *before = a->states[i] + at - p->hidden;
      state[i] = start >= 0 ? initial_state(p, a->initial, l, start, i) : before;
      gradient[i] = a->grad_states[i] ? a->grad_states[i] + at : zeros;
    }
    EACH(m, DRIVES) {
      drive[m] = at_time(p->drives[m], l, t);
      grad_drive[m] = a->grad_drives[m].data ? at_time(a->grad_drives[m], l, t) : unwanted;
    }
#pragma omp simd
    CHANNELS(d, l)
      step_adjoint(d, state, drive, coefficient, gradient, adjoint, grad_drive, total);
    if (start < 0) continue;
    EACH(i, COMPONENTS) { /* the gradient ends at an initial state */
      const int64_t row = ((l.k * p->rows + start) * COMPONENTS + i) * p->hidden + l.d0;
      if (a->grad_initial) CHANNELS(d, l) a->grad_initial[row + d] += adjoint[i][d];
      memset(adjoint[i], 0, l.n * sizeof(real));
    }
  }
  EACH(i, COMPONENTS)
    memcpy(a->outgoing + beside(p, l, COMPONENTS, i), adjoint[i], l.n * sizeof(real));
  if (!a->grad_coefficients) return;
  EACH(c, COEFFICIENTS) {
    double *kept = a->grad_coefficients + beside(p, l, COEFFICIENTS, c);
    memcpy(kept, total[c], l.n * sizeof(double));
  }
}

/* Shares the lanes (rows x chunks x blocks of channels) among threads. */
static void run(part_function *lane, const void *arguments) {
  const problem *p = arguments; /* which all arguments begin with */
  share(lane, arguments, p->batch * p->chunks * blocks(p), p->threads);
}

void forward(const int64_t *arguments) { run(forward_lane, arguments); }
void tangent(const int64_t *arguments) { run(tangent_lane, arguments); }
void backward(const int64_t *arguments) { run(backward_lane, arguments); }
