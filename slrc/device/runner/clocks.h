// How fast the processor is: its clock and temperature as the system says, and what fixed work takes; and quantiles.
#pragma once

#include <glob.h>
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "texts.h"

typedef struct {
  double work_ms, mhz, celsius;  // NAN where the system does not say
} Clocks;

static double now_s(void) {
  struct timespec time;
  clock_gettime(CLOCK_MONOTONIC, &time);
  return time.tv_sec + time.tv_nsec * 1e-9;
}

static double largest_of(const char* pattern) {
  glob_t found;
  double most = NAN;
  if (glob(pattern, 0, NULL, &found) == 0) {
    for (size_t i = 0; i < found.gl_pathc; ++i) {
      double value;
      FILE* in = fopen(found.gl_pathv[i], "r");
      if (in && fscanf(in, "%lf", &value) == 1) most = fmax(most, value);
      if (in) fclose(in);
    }
    globfree(&found);
  }
  return most;
}

static double fixed_work_ms(void) {
  volatile uint64_t sum = 0;
  double started = now_s();
  for (uint64_t i = 0; i < 500000; ++i) sum += i;
  return (now_s() - started) * 1e3;
}

static Clocks read_clocks(void) {
  Clocks clocks = {fixed_work_ms(), largest_of("/sys/devices/system/cpu/cpu[0-9]*/cpufreq/scaling_cur_freq") / 1e3,
                   largest_of("/sys/class/thermal/thermal_zone*/temp") / 1e3};
  for (int i = 0; i < 4; ++i) clocks.work_ms = fmin(clocks.work_ms, fixed_work_ms());
  return clocks;
}

static int ascending(const void* a, const void* b) {
  double x = *(const double*)a, y = *(const double*)b;
  return (x > y) - (x < y);
}

// The value that a share of the numbers lies below; they are sorted.
static double quantile(double* values, int count, double share) {
  qsort(values, (size_t)count, sizeof *values, ascending);
  if (share == 0.5 && count % 2 == 0) return (values[count / 2 - 1] + values[count / 2]) / 2;
  return values[(int)(share * count) < count ? (int)(share * count) : count - 1];
}

static double quantile_of(const double* values, int count, double share) {
  double* copy = memcpy(allocate(sizeof *copy * (size_t)count), values, sizeof *copy * (size_t)count);
  double found = quantile(copy, count, share);
  free(copy);
  return found;
}
