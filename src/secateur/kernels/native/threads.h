// parallel(count, threads, body): body(i) for every i < count, each once, on up to `threads` threads.
#pragma once
#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

typedef void (*GompParallel)(void (*)(void*), void*, unsigned, unsigned);
inline GompParallel gomp_parallel = nullptr;

template <class Body>
static void parallel(int64_t count, int32_t threads, const Body& body) {
    if (threads > count) threads = int32_t(count);
    if (threads <= 1) {
        for (int64_t i = 0; i < count; i++) body(i);
        return;
    }
    struct Work {
        std::atomic<int64_t> next{0};
        int64_t count;
        const Body* body;
    } work;
    work.count = count;
    work.body = &body;
    auto run = [](void* data) {
        Work& w = *static_cast<Work*>(data);
        for (int64_t i; (i = w.next.fetch_add(1, std::memory_order_relaxed)) < w.count;) (*w.body)(i);
    };
    if (gomp_parallel) return gomp_parallel(run, &work, unsigned(threads), 0);
    std::vector<std::thread> others;
    try {
        for (int32_t t = 1; t < threads; t++) others.emplace_back(+run, static_cast<void*>(&work));
    } catch (...) {  // the system gives no more: those that there are do the work
    }
    run(&work);
    for (auto& other : others) other.join();
}
