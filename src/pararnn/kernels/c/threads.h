/* Threads: the parts of a call are shared among them, always in the same way. With OpenMP these are
   PyTorch's own threads, awake from the operation before. */
#define MOST_THREADS 256

typedef void part_function(const void *arguments, int64_t index);

typedef struct {
  part_function *function;
  const void *arguments;
  int64_t first, last;
} job;

static void *work(void *argument) {
  const job *j = argument;
  for (int64_t i = j->first; i < j->last; i++) j->function(j->arguments, i);
  return 0;
}

static void share(part_function *function, const void *arguments, int64_t parts, int64_t threads) {
  threads = threads < parts ? threads : parts;
  threads = threads > MOST_THREADS ? MOST_THREADS : threads;
  job jobs[MOST_THREADS];
  for (int64_t i = 0; i < threads; i++)
    jobs[i] = (job){function, arguments, parts * i / threads, parts * (i + 1) / threads};
#ifdef _OPENMP
#pragma omp parallel for schedule(static, 1) num_threads(threads) if (threads > 1)
  for (int64_t i = 0; i < threads; i++) work(&jobs[i]);
#else
  pthread_t ids[MOST_THREADS];
  int started[MOST_THREADS];
  for (int64_t i = 0; i < threads; i++)
    started[i] = i > 0 && pthread_create(&ids[i], 0, work, &jobs[i]) == 0;
  for (int64_t i = 0; i < threads; i++) {
    if (started[i]) pthread_join(ids[i], 0);
    else work(&jobs[i]);
  }
#endif
}
