// The part of libgomp that the kernels use, made of std::thread and std::mutex, for builds under
// ThreadSanitizer. libgomp itself is not instrumented: TSan would not see that its barriers order
// anything and report every parallel region. It sees all of this. A region starts its threads and
// joins them: slow, and that is all right.
#include <condition_variable>
#include <map>
#include <mutex>
#include <thread>
#include <vector>

namespace {

struct Loop {
  long next, end, step, chunk;
};

struct Team {
  int threads = 1;
  std::mutex mutex;
  std::condition_variable released;
  int waiting = 0;
  long round = 0;
  std::map<long, Loop>
      loops;  // by how many dynamic loops a thread has met: some may be ahead (nowait)

  void wait() {
    std::unique_lock<std::mutex> lock(mutex);
    const long mine = round;
    if (++waiting == threads) {
      waiting = 0;
      ++round;
      released.notify_all();
    } else {
      released.wait(lock, [&] { return round != mine; });
    }
  }

  bool take(long loop, long* first, long* last) {
    std::lock_guard<std::mutex> lock(mutex);
    Loop& l = loops.at(loop);
    if (l.step > 0 ? l.next >= l.end : l.next <= l.end) return false;
    *first = l.next;
    l.next += l.step * l.chunk;
    *last = (l.step > 0 ? l.next > l.end : l.next < l.end) ? l.end : l.next;
    return true;
  }
};

thread_local Team* team = nullptr;
thread_local int number = 0;
thread_local long loops_met = 0;

void run(Team* of, int as, void (*body)(void*), void* data) {
  Team* const team_before = team;
  const int number_before = number;
  const long loops_before = loops_met;
  team = of;
  number = as;
  loops_met = 0;
  body(data);
  team = team_before;
  number = number_before;
  loops_met = loops_before;
}

}  // namespace

extern "C" {

int omp_get_thread_num() { return number; }
int omp_get_num_threads() { return team ? team->threads : 1; }
int omp_get_max_threads() { return 4; }

void GOMP_parallel(void (*body)(void*), void* data, unsigned threads, unsigned) {
  Team own;
  own.threads = threads ? static_cast<int>(threads) : omp_get_max_threads();
  std::vector<std::thread> others;
  for (int i = 1; i < own.threads; ++i) others.emplace_back(run, &own, i, body, data);
  run(&own, 0, body, data);
  for (std::thread& other : others) other.join();
}

void GOMP_barrier() {
  if (team) team->wait();
}

bool GOMP_loop_nonmonotonic_dynamic_next(long* first, long* last) {
  return team->take(loops_met, first, last);
}

bool GOMP_loop_nonmonotonic_dynamic_start(long start, long end, long step, long chunk, long* first,
                                          long* last) {
  ++loops_met;
  {
    std::lock_guard<std::mutex> lock(team->mutex);
    team->loops.emplace(loops_met, Loop{start, end, step, chunk});
  }
  return team->take(loops_met, first, last);
}

void GOMP_loop_end() { GOMP_barrier(); }
void GOMP_loop_end_nowait() {}

}  // extern "C"
