// The library's own threads. They start at the first call, sleep between calls, and serve one call at a time.
#include <pthread.h>

#include "job.h"

namespace {

constexpr int MAX_STARTED = 255;  // threads beside the caller

struct Pool {
    pthread_mutex_t busy = PTHREAD_MUTEX_INITIALIZER;  // locked by the call that has the pool
    pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;  // guards everything below
    pthread_cond_t wake = PTHREAD_COND_INITIALIZER, done = PTHREAD_COND_INITIALIZER;
    pthread_t threads[MAX_STARTED];
    int started = 0;
    bool closing = false;
    fastlstm_task task = nullptr;
    void *argument = nullptr;
    int thread_count = 0, running = 0;  // threads of this call; and those that still run, without the caller
    uint64_t call = 0;
} pool;

void *work(void *number) {
    const int thread = (int)(intptr_t)number;
    pthread_mutex_lock(&pool.lock);
    // The call that starts this thread increments `call` before it unlocks, so with `call - 1` the thread joins it.
    uint64_t last_call = pool.call - 1;
    for (;;) {
        while (pool.call == last_call && !pool.closing) pthread_cond_wait(&pool.wake, &pool.lock);
        if (pool.closing) break;
        last_call = pool.call;
        if (thread >= pool.thread_count) continue;
        fastlstm_task task = pool.task;
        void *argument = pool.argument;
        int thread_count = pool.thread_count;
        pthread_mutex_unlock(&pool.lock);
        task(argument, thread, thread_count);
        pthread_mutex_lock(&pool.lock);
        if (--pool.running == 0) pthread_cond_signal(&pool.done);
    }
    pthread_mutex_unlock(&pool.lock);
    return nullptr;
}

// A forked child has none of its parent's threads, and locks in any state. It starts with a pool of its own.
void reset_pool() { pool = Pool(); }

__attribute__((constructor)) void watch_forks() { pthread_atfork(nullptr, nullptr, reset_pool); }

__attribute__((destructor)) void close_pool() {
    pthread_mutex_lock(&pool.lock);
    pool.closing = true;
    pthread_cond_broadcast(&pool.wake);
    pthread_mutex_unlock(&pool.lock);
    for (int k = 0; k < pool.started; k++) pthread_join(pool.threads[k], nullptr);
}

struct Region {
    const fastlstm_openmp *openmp;
    fastlstm_task task;
    void *argument;
};

void run_region(void *region) {
    const Region &r = *(const Region *)region;
    r.task(r.argument, r.openmp->omp_get_thread_num(), r.openmp->omp_get_num_threads());
}

}  // namespace

void fastlstm::run_in_pool(fastlstm_task task, void *argument, int threads) {
    if (pthread_mutex_trylock(&pool.busy)) return task(argument, 0, 1);  // another call has the pool
    pthread_mutex_lock(&pool.lock);
    while (pool.started < threads - 1 && pool.started < MAX_STARTED) {
        void *number = (void *)(intptr_t)(pool.started + 1);
        if (pthread_create(&pool.threads[pool.started], nullptr, work, number)) break;
        pool.started++;
    }
    int thread_count = threads - 1 < pool.started ? threads : pool.started + 1;
    pool.task = task, pool.argument = argument, pool.thread_count = thread_count;
    pool.running = thread_count - 1, pool.call++;
    pthread_cond_broadcast(&pool.wake);
    pthread_mutex_unlock(&pool.lock);
    task(argument, 0, thread_count);
    pthread_mutex_lock(&pool.lock);
    while (pool.running) pthread_cond_wait(&pool.done, &pool.lock);
    pthread_mutex_unlock(&pool.lock);
    pthread_mutex_unlock(&pool.busy);
}

// Runs a task on the threads of the OpenMP library whose functions are in `context`, such as torch's.
void fastlstm_parallel_openmp(void *context, fastlstm_task task, void *argument, int threads) {
    const fastlstm_openmp *openmp = (const fastlstm_openmp *)context;
    Region region = {openmp, task, argument};
    openmp->GOMP_parallel(run_region, &region, (unsigned)threads, 0);
}
