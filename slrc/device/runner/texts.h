// Memory that is there or ends the program, and texts in it.
#pragma once

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>

static void* allocate(size_t bytes) {
  void* memory_block = calloc(1, bytes ? bytes : 1);
  if (!memory_block) {
    fputs("error: there is not enough memory\n", stderr);
    exit(2);
  }
  return memory_block;
}

static char* format(const char* pattern, ...) {
  char* text = NULL;
  va_list arguments;
  va_start(arguments, pattern);
  if (vasprintf(&text, pattern, arguments) < 0) exit(2);
  va_end(arguments);
  return text;
}
