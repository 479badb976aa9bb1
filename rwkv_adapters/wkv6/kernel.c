/* WKV6 on a CPU, forward and backward, in plain C: no headers but the C library's, called through plain addresses.

   The documents of a row lie end to end: r, k, v, decay, y are (T, H, N), bonus is (H, N), states are (D, H, N, N), [key][value]; decay
   is exp(log_decay). Document d is the steps [starts[d], starts[d + 1]). Heads and documents do not touch each other: they are
   numbered, pair = head * D + document, and shares of the pairs run at once, share s the pairs [shares[s], shares[s + 1]).

   Threads are the caller's: `parallel` is an OpenMP runtime's GOMP_parallel, or NULL for none. It runs a function on so many threads,
   which are torch's own where the runtime is: those of another pool would wait for torch's, which spin for a while after their work.

   Forward leaves the state before every SEGMENT-th step of a document, if it is given the place: checkpoints, (number, H, N, N), those
   of document d from kept[d] on. Backward computes the states in between from them.

   The file includes itself once for each type: REAL is the type, TYPED(x) the name of x for it. */

#ifndef REAL

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(_WIN32)
#define EXPORT __declspec(dllexport)
#else
#define EXPORT __attribute__((visibility("default")))
#endif

/* One library for several generations of CPUs: the loader takes the newest variant that the machine can run. */
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
#define EACH_CPU __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define EACH_CPU
#endif

/* What is inlined sees a common head size as a constant. */
#if defined(__GNUC__)
#define INLINE static inline __attribute__((always_inline))
#else
#define INLINE static inline
#endif

#define COMMON_HEAD_SIZES(CALL) \
    case 8: CALL(8); break; \
    case 16: CALL(16); break; \
    case 32: CALL(32); break; \
    case 64: CALL(64); break; \
    case 128: CALL(128); break;
#define NO_HEAD_SIZES(CALL)

enum { SEGMENT = 64, COLUMNS = 4 }; /* backward takes COLUMNS columns of the state at once */

/* Other signatures, or another meaning of theirs, are another version; c.py knows which it calls. */
EXPORT int wkv6_version(void) { return 2; }

typedef void (*parallel_function)(void (*work)(void *), void *job, unsigned threads, unsigned flags);

/* The next share that no thread has taken. */
#if defined(__GNUC__)
#define TAKE(job) __atomic_fetch_add(&(job)->taken, 1, __ATOMIC_RELAXED)
#else
#define TAKE(job) ((job)->taken++) /* one thread */
#endif

#define REAL float
#define TYPED(x) x##_float32
#define HEAD_SIZES COMMON_HEAD_SIZES
#include "kernel.c"
#undef REAL
#undef TYPED
#undef HEAD_SIZES
#define REAL double
#define TYPED(x) x##_float64
#define HEAD_SIZES NO_HEAD_SIZES /* for checks; compiles in half the time */
#include "kernel.c"

#else

/* One head of one document: pointers are to its first step, and `next` values lie between steps. S: the state before, then after it.
   checkpoints may be NULL; `next_checkpoint` values lie between two of them. */
INLINE void TYPED(forward_pair)(
        int64_t N, int64_t steps, int64_t next, int64_t next_checkpoint, const REAL *restrict r, const REAL *restrict k,
        const REAL *restrict v, const REAL *restrict decay, const REAL *restrict bonus, REAL *restrict S, REAL *restrict y,
        REAL *restrict checkpoints) {
    for (int64_t t = 0; t < steps; t++, r += next, k += next, v += next, decay += next, y += next) {
        if (checkpoints && t % SEGMENT == 0)
            memcpy(checkpoints + t / SEGMENT * next_checkpoint, S, N * N * sizeof(REAL));
        REAL rk = 0;
        for (int64_t i = 0; i < N; i++)
            rk += r[i] * bonus[i] * k[i];
        for (int64_t j = 0; j < N; j++)
            y[j] = rk * v[j];
        int64_t i = 0;
        for (; i + 4 <= N; i += 4) { /* four rows, so that y and v are read less often */
            REAL *restrict S0 = S + i * N, *restrict S1 = S0 + N, *restrict S2 = S1 + N, *restrict S3 = S2 + N;
#pragma omp simd
            for (int64_t j = 0; j < N; j++) {
                y[j] += (r[i] * S0[j] + r[i + 1] * S1[j]) + (r[i + 2] * S2[j] + r[i + 3] * S3[j]);
                S0[j] = decay[i] * S0[j] + k[i] * v[j];
                S1[j] = decay[i + 1] * S1[j] + k[i + 1] * v[j];
                S2[j] = decay[i + 2] * S2[j] + k[i + 2] * v[j];
                S3[j] = decay[i + 3] * S3[j] + k[i + 3] * v[j];
            }
        }
        for (; i < N; i++) {
            REAL *restrict S0 = S + i * N;
#pragma omp simd
            for (int64_t j = 0; j < N; j++) {
                y[j] += r[i] * S0[j];
                S0[j] = decay[i] * S0[j] + k[i] * v[j];
            }
        }
    }
}

EACH_CPU static void TYPED(forward_share)(
        int64_t first, int64_t last, int64_t D, int64_t H, int64_t N, const int64_t *starts, const int64_t *kept, const REAL *r,
        const REAL *k, const REAL *v, const REAL *decay, const REAL *bonus, REAL *state, REAL *y, REAL *checkpoints) {
    for (int64_t pair = first; pair < last; pair++) {
        const int64_t h = pair / D, d = pair % D, at = (starts[d] * H + h) * N;
#define CALL(SIZE) \
        TYPED(forward_pair)(SIZE, starts[d + 1] - starts[d], H * (SIZE), H * (SIZE) * (SIZE), r + at, k + at, v + at, decay + at, \
                            bonus + h * N, state + (d * H + h) * N * N, y + at, \
                            checkpoints ? checkpoints + (kept[d] * H + h) * N * N : NULL)
        switch (N) {
            HEAD_SIZES(CALL)
            default: CALL(N);
        }
#undef CALL
    }
}

struct TYPED(forward_job) {
    int64_t taken, count;
    const int64_t *shares;
    int64_t D, H, N;
    const int64_t *starts, *kept;
    const REAL *r, *k, *v, *decay, *bonus;
    REAL *state, *y, *checkpoints;
};

static void TYPED(forward_work)(void *given) {
    struct TYPED(forward_job) *job = given;
    for (int64_t share; (share = TAKE(job)) < job->count;)
        TYPED(forward_share)(job->shares[share], job->shares[share + 1], job->D, job->H, job->N, job->starts, job->kept, job->r, job->k,
                             job->v, job->decay, job->bonus, job->state, job->y, job->checkpoints);
}

/* Returns 0. `state` is overwritten with the state after each document. */
EXPORT int TYPED(wkv6_forward)(
        parallel_function parallel, int64_t count, const int64_t *shares, int64_t D, int64_t H, int64_t N, const int64_t *starts,
        const int64_t *kept, const REAL *r, const REAL *k, const REAL *v, const REAL *decay, const REAL *bonus, REAL *state, REAL *y,
        REAL *checkpoints) {
    struct TYPED(forward_job) job = {0, count, shares, D, H, N, starts, kept, r, k, v, decay, bonus, state, y, checkpoints};
    if (parallel && count > 1)
        parallel(TYPED(forward_work), &job, (unsigned)count, 0);
    else
        TYPED(forward_work)(&job);
    return 0;
}

/* Backward works on the transposed state, [value][key]: its columns depend on each other in nothing, and three of the four gradients of
   a step need no sum across a vector. This does COLUMNS columns of a segment, from column j on, and adds to gr, gk and g_decay.
   S_0: the transposed columns before the segment, then room for those before each step of it; gS: those of the gradient of the state
   after the segment, then before it; v, gy: the columns' values alone, COLUMNS a step; gv likewise, set. */
INLINE void TYPED(backward_columns)(
        int64_t N, int64_t steps, int64_t next, const REAL *restrict r, const REAL *restrict k, const REAL *restrict decay,
        const REAL *restrict v, const REAL *restrict gy, REAL *restrict S_0, REAL *restrict gS, REAL *restrict gr, REAL *restrict gk,
        REAL *restrict g_decay, REAL *restrict gv) {
    for (int64_t t = 0; t + 1 < steps; t++) {
        const REAL *restrict S = S_0 + t * COLUMNS * N, *restrict kt = k + t * next, *restrict wt = decay + t * next;
        REAL *restrict S_next = S_0 + (t + 1) * COLUMNS * N;
        for (int64_t c = 0; c < COLUMNS; c++) {
            const REAL vc = v[t * COLUMNS + c];
#pragma omp simd
            for (int64_t i = 0; i < N; i++)
                S_next[c * N + i] = wt[i] * S[c * N + i] + kt[i] * vc;
        }
    }
    REAL *restrict gS0 = gS, *restrict gS1 = gS + N, *restrict gS2 = gS + 2 * N, *restrict gS3 = gS + 3 * N;
    for (int64_t t = steps - 1; t >= 0; t--) {
        const REAL *restrict S0 = S_0 + t * COLUMNS * N, *restrict S1 = S0 + N, *restrict S2 = S1 + N, *restrict S3 = S2 + N;
        const REAL *restrict rt = r + t * next, *restrict kt = k + t * next, *restrict wt = decay + t * next;
        REAL *restrict grt = gr + t * next, *restrict gkt = gk + t * next, *restrict gwt = g_decay + t * next;
        const REAL v0 = v[t * COLUMNS], v1 = v[t * COLUMNS + 1], v2 = v[t * COLUMNS + 2], v3 = v[t * COLUMNS + 3];
        const REAL g0 = gy[t * COLUMNS], g1 = gy[t * COLUMNS + 1], g2 = gy[t * COLUMNS + 2], g3 = gy[t * COLUMNS + 3];
        REAL gv0 = 0, gv1 = 0, gv2 = 0, gv3 = 0;
#pragma omp simd reduction(+ : gv0, gv1, gv2, gv3)
        for (int64_t i = 0; i < N; i++) {
            const REAL d0 = gS0[i], d1 = gS1[i], d2 = gS2[i], d3 = gS3[i];
            grt[i] += (g0 * S0[i] + g1 * S1[i]) + (g2 * S2[i] + g3 * S3[i]);
            gkt[i] += (v0 * d0 + v1 * d1) + (v2 * d2 + v3 * d3);
            gwt[i] += (d0 * S0[i] + d1 * S1[i]) + (d2 * S2[i] + d3 * S3[i]);
            gv0 += kt[i] * d0;
            gv1 += kt[i] * d1;
            gv2 += kt[i] * d2;
            gv3 += kt[i] * d3;
            gS0[i] = wt[i] * d0 + rt[i] * g0;
            gS1[i] = wt[i] * d1 + rt[i] * g1;
            gS2[i] = wt[i] * d2 + rt[i] * g2;
            gS3[i] = wt[i] * d3 + rt[i] * g3;
        }
        gv[t * COLUMNS] = gv0;
        gv[t * COLUMNS + 1] = gv1;
        gv[t * COLUMNS + 2] = gv2;
        gv[t * COLUMNS + 3] = gv3;
    }
}

/* As forward_pair. g_state: the gradient of the state after the document, then before it. g_bonus: this pair's share, set.
   gS: room for a transposed state, its columns rounded up to a multiple of COLUMNS; S: room for SEGMENT times COLUMNS columns. */
INLINE void TYPED(backward_pair)(
        int64_t N, int64_t steps, int64_t next, int64_t next_checkpoint, const REAL *restrict r, const REAL *restrict k,
        const REAL *restrict v, const REAL *restrict decay, const REAL *restrict bonus, const REAL *restrict checkpoints,
        const REAL *restrict gy, REAL *restrict g_state, REAL *restrict gr, REAL *restrict gk, REAL *restrict gv,
        REAL *restrict g_log_decay, REAL *restrict g_bonus, REAL *restrict gS, REAL *restrict S) {
    REAL v_columns[SEGMENT * COLUMNS], gy_columns[SEGMENT * COLUMNS], gv_columns[SEGMENT * COLUMNS];
    memset(gS, 0, (N + COLUMNS) * N * sizeof(REAL));
    for (int64_t j = 0; j < N; j++)
        for (int64_t i = 0; i < N; i++)
            gS[j * N + i] = g_state[i * N + j];
    memset(g_bonus, 0, N * sizeof(REAL));
    for (int64_t begin = (steps - 1) / SEGMENT * SEGMENT; begin >= 0; begin -= SEGMENT) {
        const int64_t n = steps - begin < SEGMENT ? steps - begin : SEGMENT, at = begin * next;
        const REAL *restrict checkpoint = checkpoints + begin / SEGMENT * next_checkpoint;
        for (int64_t t = begin; t < begin + n; t++) { /* what goes through the bonus */
            const int64_t o = t * next;
            REAL gyv = 0, rk = 0;
            for (int64_t i = 0; i < N; i++) {
                gyv += gy[o + i] * v[o + i];
                rk += r[o + i] * bonus[i] * k[o + i];
            }
            for (int64_t i = 0; i < N; i++) {
                gr[o + i] = gyv * bonus[i] * k[o + i];
                gk[o + i] = gyv * bonus[i] * r[o + i];
                gv[o + i] = rk * gy[o + i];
                g_log_decay[o + i] = 0;
                g_bonus[i] += gyv * r[o + i] * k[o + i];
            }
        }
        for (int64_t j = 0; j < N; j += COLUMNS) {
            const int64_t columns = N - j < COLUMNS ? N - j : COLUMNS;
            if (columns < COLUMNS) { /* the columns that are missing are zero */
                memset(v_columns, 0, sizeof v_columns);
                memset(gy_columns, 0, sizeof gy_columns);
                memset(S, 0, COLUMNS * N * sizeof(REAL));
            }
            for (int64_t c = 0; c < columns; c++)
                for (int64_t i = 0; i < N; i++)
                    S[c * N + i] = checkpoint[i * N + j + c];
            for (int64_t t = 0; t < n; t++)
                for (int64_t c = 0; c < columns; c++) {
                    v_columns[t * COLUMNS + c] = v[at + t * next + j + c];
                    gy_columns[t * COLUMNS + c] = gy[at + t * next + j + c];
                }
            TYPED(backward_columns)(N, n, next, r + at, k + at, decay + at, v_columns, gy_columns, S, gS + j * N, gr + at, gk + at,
                                    g_log_decay + at, gv_columns);
            for (int64_t t = 0; t < n; t++)
                for (int64_t c = 0; c < columns; c++)
                    gv[at + t * next + j + c] += gv_columns[t * COLUMNS + c];
        }
        for (int64_t t = begin; t < begin + n; t++) /* d decay / d log_decay = decay */
            for (int64_t i = 0; i < N; i++)
                g_log_decay[t * next + i] *= decay[t * next + i];
    }
    for (int64_t j = 0; j < N; j++)
        for (int64_t i = 0; i < N; i++)
            g_state[i * N + j] = gS[j * N + i];
}

/* Returns 0, or 1 where there is no memory. */
EACH_CPU static int TYPED(backward_share)(
        int64_t first, int64_t last, int64_t D, int64_t H, int64_t N, const int64_t *starts, const int64_t *kept, const REAL *r,
        const REAL *k, const REAL *v, const REAL *decay, const REAL *bonus, const REAL *checkpoints, const REAL *gy, REAL *g_state,
        REAL *gr, REAL *gk, REAL *gv, REAL *g_log_decay, REAL *g_bonus) {
    REAL *room = malloc(((N + COLUMNS) * N + SEGMENT * COLUMNS * N) * sizeof(REAL));
    if (!room)
        return 1;
    for (int64_t pair = first; pair < last; pair++) {
        const int64_t h = pair / D, d = pair % D, at = (starts[d] * H + h) * N;
#define CALL(SIZE) \
        TYPED(backward_pair)(SIZE, starts[d + 1] - starts[d], H * (SIZE), H * (SIZE) * (SIZE), r + at, k + at, v + at, decay + at, \
                             bonus + h * N, checkpoints + (kept[d] * H + h) * N * N, gy + at, g_state + (d * H + h) * N * N, gr + at, \
                             gk + at, gv + at, g_log_decay + at, g_bonus + (d * H + h) * N, room, room + (N + COLUMNS) * N)
        switch (N) {
            HEAD_SIZES(CALL)
            default: CALL(N);
        }
#undef CALL
    }
    free(room);
    return 0;
}

struct TYPED(backward_job) {
    int64_t taken, count;
    const int64_t *shares;
    int64_t D, H, N;
    const int64_t *starts, *kept;
    const REAL *r, *k, *v, *decay, *bonus, *checkpoints, *gy;
    REAL *g_state, *gr, *gk, *gv, *g_log_decay, *g_bonus;
    int failed;
};

static void TYPED(backward_work)(void *given) {
    struct TYPED(backward_job) *job = given;
    for (int64_t share; (share = TAKE(job)) < job->count;)
        if (TYPED(backward_share)(job->shares[share], job->shares[share + 1], job->D, job->H, job->N, job->starts, job->kept, job->r,
                                  job->k, job->v, job->decay, job->bonus, job->checkpoints, job->gy, job->g_state, job->gr, job->gk,
                                  job->gv, job->g_log_decay, job->g_bonus))
            job->failed = 1;
}

/* Returns 0, or 1 where there is no memory. `g_state` is overwritten with the gradient of the state before each document; g_bonus is
   (D, H, N), each document's part. */
EXPORT int TYPED(wkv6_backward)(
        parallel_function parallel, int64_t count, const int64_t *shares, int64_t D, int64_t H, int64_t N, const int64_t *starts,
        const int64_t *kept, const REAL *r, const REAL *k, const REAL *v, const REAL *decay, const REAL *bonus, const REAL *checkpoints,
        const REAL *gy, REAL *g_state, REAL *gr, REAL *gk, REAL *gv, REAL *g_log_decay, REAL *g_bonus) {
    struct TYPED(backward_job) job = {0,     count,       shares, D,       H,  N,  starts, kept,        r,       k, v,
                                      decay, bonus,       checkpoints, gy, g_state, gr, gk, gv, g_log_decay, g_bonus, 0};
    if (parallel && count > 1)
        parallel(TYPED(backward_work), &job, (unsigned)count, 0);
    else
        TYPED(backward_work)(&job);
    return job.failed;
}

#endif
