// Check and time the models of a bundle on a device without Python: `bench LIBONNXRUNTIME [FOLDER]`.
//
// It reads `run.txt` in the bundle's folder, the current one by default, loads the runtime that it is given, and does
// what `bench.py` does: checks each file's sha256, runs each model once and compares its outputs, and times each run,
// its models in turns. What it found it prints, a JSON object a line, and writes to `result.json` as `bench.py` does.
// It ends with 0, with 1 where an output differs or a model cannot run, and with 2 where nothing can.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "clocks.h"
#include "ort_abi.h"
#include "sha256.h"

enum { kMostModels = 256, kMostTensors = 64, kMostDims = 16, kMostRounds = 1000, kRaceRounds = 3, kSpareBlocks = 2 };

typedef struct {
  char *name, *file;  // `file` is null where nothing is expected
  int kind;           // the place in `kTypes`
  int64_t dims[kMostDims];
  size_t rank, count;
  double tolerance;
} Tensor;

typedef struct {
  char *name, *file, *kernels, *why_not;
  Tensor inputs[kMostTensors], outputs[kMostTensors];
  size_t input_count, output_count;
  OrtObject *session, *values[kMostTensors];
} Model;

typedef struct {
  double seconds;
  int least_rounds, blocks, is_race, count;
  int models[kMostModels];
} Run;

typedef struct {
  double* ms[kMostModels];
  int counts[kMostModels];
  Clocks before, after;
  char drift[96];
} Block;

static Model* models[kMostModels];
static int model_count, threads, differs;
static FILE* result;  // result.json on its way

static void put_text(FILE* out, const char* text) {
  fputc('"', out);
  for (; *text; ++text) {
    unsigned char c = (unsigned char)*text;
    if (c == '"' || c == '\\')
      fprintf(out, "\\%c", c);
    else if (c < 32)
      fprintf(out, "\\u%04x", c);
    else
      fputc(c, out);
  }
  fputc('"', out);
}

static void put_number(FILE* out, double value) {
  if (isfinite(value))
    fprintf(out, "%.17g", value);
  else
    fputs(isnan(value) ? "\"nan\"" : value > 0 ? "\"inf\"" : "\"-inf\"", out);
}

// What keeps the bundle from running here: a result with nothing but that, and the end.
static void fail(const char* kind, char* what, const char* hint) {
  if (result) fclose(result);
  FILE* out = fopen("result.json.partial", "w");
  if (out) {
    fputs("{\"result_version\": 1, \"runtime\": \"\", \"outputs\": [], \"why_not\": {}, \"runs\": [], \"failure\": {",
          out);
    fprintf(out, "\"kind\": \"%s\", \"what\": ", kind);
    put_text(out, what);
    fputs(", \"hint\": ", out);
    put_text(out, hint);
    fputs("}}\n", out);
    if (fclose(out) == 0) rename("result.json.partial", "result.json");
  }
  fprintf(stderr, "error: %s\n%s%s%s", what, *hint ? "hint: " : "", hint, *hint ? "\n" : "");
  exit(2);
}

// --- the bundle

// A file's content with a zero behind it; null if it cannot be read. Names lead nowhere but into the bundle.
static char* read_file(const char* name, size_t* bytes) {
  struct stat info;
  if (name[0] == '/' || strstr(name, ".."))
    fail("manifest", format("run.txt names `%s`, which is no file of the bundle", name), "");
  FILE* in = fopen(name, "rb");
  if (!in || fstat(fileno(in), &info)) return NULL;
  char* data = allocate((size_t)info.st_size + 1);
  *bytes = fread(data, 1, (size_t)info.st_size, in);
  fclose(in);
  return data;
}

static void check_file(const char* digest, const char* name) {
  size_t bytes = 0;
  char found[65], *data = read_file(name, &bytes);
  if (data) sha256_hex(data, bytes, found);
  if (!data || strcmp(found, digest))
    fail("damaged", format("`%s` is damaged: its sha256 is not that in run.txt", name), "copy it again");
  free(data);
}

static Tensor read_tensor(char** fields) {
  Tensor tensor = {.name = fields[1], .file = strcmp(fields[4], "-") ? fields[4] : NULL, .count = 1, .kind = -1};
  for (size_t i = 0; i < sizeof kTypes / sizeof *kTypes; ++i)
    if (!strcmp(kTypes[i].name, fields[2])) tensor.kind = (int)i;
  if (tensor.kind < 0) fail("manifest", format("run.txt has a tensor of type %s", fields[2]), "use bench.py");
  for (char* text = strcmp(fields[3], "scalar") ? fields[3] : NULL; text && tensor.rank < kMostDims; ++text) {
    tensor.dims[tensor.rank] = strtoll(text, &text, 10);
    tensor.count *= (size_t)tensor.dims[tensor.rank++];
    if (*text != 'x') break;
  }
  return tensor;
}

static int index_of(const char* name) {
  for (int i = 0; i < model_count; ++i)
    if (!strcmp(models[i]->name, name)) return i;
  fail("manifest", format("run.txt times the model `%s`, which there is not", name), "");
  return -1;
}

// Read run.txt, a statement a line, in fields that a tab separates; return the number of runs.
static int read_bundle(Run* runs, int most) {
  size_t bytes = 0;
  int run_count = 0;
  char *text = read_file("run.txt", &bytes), *rest = NULL;
  if (!text) fail("manifest", format("run.txt cannot be read"), "give the bundle's folder");
  for (char* line = strtok_r(text, "\n", &rest); line; line = strtok_r(NULL, "\n", &rest)) {
    char *fields[kMostModels] = {0}, *next = line;
    int count = 0;
    while (next && count < kMostModels) fields[count++] = strsep(&next, "\t");
    Model* model = model_count ? models[model_count - 1] : NULL;
    const char* what = fields[0];
    if (!strcmp(what, "slrc-bundle") && count > 1) {
      if (strcmp(fields[1], "1"))
        fail("manifest", format("the bundle has version %s, this runner takes 1", fields[1]), "");
    } else if (!strcmp(what, "threads") && count > 1) {
      threads = atoi(fields[1]);
    } else if (!strcmp(what, "file") && count > 2) {
      check_file(fields[1], fields[2]);
    } else if (!strcmp(what, "model") && count > 3 && model_count < kMostModels) {
      models[model_count] = allocate(sizeof(Model));
      models[model_count]->name = fields[1];
      models[model_count]->file = fields[2];
      models[model_count++]->kernels = strcmp(fields[3], "-") ? fields[3] : NULL;
    } else if (!strcmp(what, "input") && count > 4 && model && model->input_count < kMostTensors) {
      model->inputs[model->input_count++] = read_tensor(fields);
    } else if (!strcmp(what, "output") && count > 5 && model && model->output_count < kMostTensors) {
      model->outputs[model->output_count] = read_tensor(fields);
      model->outputs[model->output_count++].tolerance = strtod(fields[5], NULL);
    } else if (!strcmp(what, "run") && count > 5 && run_count < most) {
      Run* run = &runs[run_count++];
      *run = (Run){strtod(fields[1], NULL), atoi(fields[2]), atoi(fields[3]), atoi(fields[4]), 0, {0}};
      for (int i = 5; i < count; ++i) run->models[run->count++] = index_of(fields[i]);
    } else if (strcmp(what, "target")) {
      fail("manifest", format("run.txt has a line `%s` that this runner does not take", what), "use bench.py");
    }
  }
  return run_count;
}

// --- the runtime

static const char* load_runtime(const char* path) {
  struct Base {
    void* const* (*GetApi)(uint32_t version);
    const char* (*GetVersionString)(void);
  };
  void* library = dlopen(path, RTLD_NOW | RTLD_GLOBAL);
  if (!library)
    fail("runtime", format("`%s` cannot be loaded: %s", path, dlerror()), "give the libonnxruntime.so of this system");
  const struct Base* (*base)(void) = (const struct Base* (*)(void))dlsym(library, "OrtGetApiBase");
  if (!base) fail("runtime", format("`%s` is not ONNX Runtime", path), "give its libonnxruntime.so");
  void* const* table = base()->GetApi(kOrtVersion);
  if (!table)
    fail("runtime", format("ONNX Runtime %s is too old: 1.%d is needed", base()->GetVersionString(), kOrtVersion),
         "install a newer one");
#define LOAD(slot, result, name, arguments) ort.name = (result(*) arguments)table[slot];
  ENTRIES(LOAD)
#undef LOAD
  char* why = problem(ort.CreateEnv(kError, "slrc", &env));
  if (!why) why = problem(ort.CreateCpuMemoryInfo(kArena, kDefaultMemory, &memory));
  if (why) fail("runtime", format("ONNX Runtime cannot start: %s", why), "");
  return base()->GetVersionString();
}

// Whether the processor has instructions that sum four products of bytes in 32 bits.
static int has_vnni(void) {
  FILE* in = fopen("/proc/cpuinfo", "r");
  char* line = NULL;
  size_t size = 0;
  int found = 0;
  while (in && !found && getline(&line, &size, in) >= 0) found = strstr(line, "vnni") != NULL;
  free(line);
  if (in) fclose(in);
  return found;
}

// Load a model and its inputs; return why it cannot be, or null.
static char* load_model(Model* model) {
  OrtObject* options = NULL;
  void* library = NULL;
  char* why = problem(ort.CreateSessionOptions(&options));
  // The last is for x86 without VNNI, where products of int8 would be summed in 16 bits; with it, it only costs time.
  const char* entries[][2] = {{"session.force_spinning_stop", "1"},
                              {"session.set_denormal_as_zero", "1"},
                              {"session.x64quantprecision", "1"}};
  const int count = has_vnni() ? 2 : 3;
  for (int i = 0; !why && i < count; ++i)
    why = problem(ort.AddSessionConfigEntry(options, entries[i][0], entries[i][1]));
  if (!why && threads) why = problem(ort.SetIntraOpNumThreads(options, threads));
  if (!why && threads) why = problem(ort.SetInterOpNumThreads(options, 1));
  if (!why && model->kernels) {
    char* path = realpath(model->kernels, NULL);
    why =
        path ? problem(ort.RegisterCustomOpsLibrary(options, path, &library)) : format("%s is missing", model->kernels);
  }
  if (!why) why = problem(ort.CreateSession(env, model->file, options, &model->session));
  for (size_t i = 0; !why && i < model->input_count; ++i) {
    Tensor* x = &model->inputs[i];
    size_t bytes = 0, expected = x->count * (size_t)kTypes[x->kind].size;
    char* data = x->file ? read_file(x->file, &bytes) : NULL;
    if (!data || bytes != expected)
      why = format("%s has %zu bytes, its shape needs %zu", x->name, bytes, expected);
    else
      why = problem(ort.CreateTensorWithDataAsOrtValue(memory, data, bytes, x->dims, x->rank, kTypes[x->kind].type,
                                                       &model->values[i]));
  }
  return why;
}

static char* run_model(Model* model, OrtObject** outputs) {
  const char *ins[kMostTensors], *outs[kMostTensors];
  for (size_t i = 0; i < model->input_count; ++i) ins[i] = model->inputs[i].name;
  for (size_t i = 0; i < model->output_count; ++i) outs[i] = model->outputs[i].name, outputs[i] = NULL;
  return problem(
      ort.Run(model->session, NULL, ins, model->values, model->input_count, outs, model->output_count, outputs));
}

static void release_values(OrtObject** values, size_t count) {
  for (size_t i = 0; i < count; ++i)
    if (values[i]) ort.ReleaseValue(values[i]);
}

// --- outputs

static double half(uint16_t bits) {
  int exponent = bits >> 10 & 31;
  double fraction = bits & 1023, sign = bits >> 15 ? -1 : 1;
  if (exponent == 31) return fraction > 0 ? NAN : sign * INFINITY;
  return sign * (exponent ? ldexp(1024 + fraction, exponent - 25) : ldexp(fraction, -24));
}

static double number(const void* data, int kind, size_t i) {
  switch (kTypes[kind].type) {
    case 1:
      return ((const float*)data)[i];
    case 3:
      return ((const int8_t*)data)[i];
    case 5:
      return ((const int16_t*)data)[i];
    case 6:
      return ((const int32_t*)data)[i];
    case 7:
      return (double)((const int64_t*)data)[i];
    case 10:
      return half(((const uint16_t*)data)[i]);
    case 11:
      return ((const double*)data)[i];
    default:
      return ((const uint8_t*)data)[i];
  }
}

// Compare an output with what is expected of it: the largest difference, as a share of the largest finite value.
static void compare(Model* model, Tensor* y, OrtObject* value, int* compared) {
  OrtObject* info = NULL;
  int64_t dims[kMostDims];
  size_t rank = 0, bytes = 0;
  int type = 0;
  void* data = NULL;
  char* expected = read_file(y->file, &bytes);
  if (problem(ort.GetTensorTypeAndShape(value, &info)) || problem(ort.GetTensorElementType(info, &type)) ||
      problem(ort.GetDimensionsCount(info, &rank)) || problem(ort.GetTensorMutableData(value, &data)))
    rank = kMostDims + 1;
  int same =
      expected && rank == y->rank && type == kTypes[y->kind].type && bytes == y->count * (size_t)kTypes[y->kind].size;
  if (same && rank) same = !problem(ort.GetDimensions(info, dims, rank)) && !memcmp(dims, y->dims, rank * sizeof *dims);
  double largest = same ? 0 : INFINITY, scale = 0;
  for (size_t i = 0; same && i < y->count; ++i) {
    double a = number(expected, y->kind, i), b = number(data, y->kind, i);
    double apart = a == b || (isnan(a) && isnan(b)) ? 0 : fabs(a - b);
    largest = fmax(largest, isnan(apart) ? INFINITY : apart);
    if (isfinite(a)) scale = fmax(scale, fabs(a));
  }
  double error = scale > 0 ? largest / scale : largest;
  differs |= !(error <= y->tolerance);
  FILE* files[] = {result, stdout};
  fputs((*compared)++ ? ", " : "", result);
  for (int i = 0; i < 2; ++i) {
    fputs("{\"model\": ", files[i]), put_text(files[i], model->name);
    fputs(", \"output\": ", files[i]), put_text(files[i], y->name);
    fputs(", \"error\": ", files[i]), put_number(files[i], error);
    fputs(", \"largest\": ", files[i]), put_number(files[i], largest);
    fprintf(files[i], ", \"tolerance\": %.17g, \"passed\": %s}", y->tolerance,
            error <= y->tolerance ? "true" : "false");
  }
  puts("");
  if (info) ort.ReleaseTensorTypeAndShapeInfo(info);
  free(expected);
}

// --- time

// A turn is two runs, of which the second counts: its caches are its own.
static double turn_ms(Model* model) {
  OrtObject* outputs[kMostTensors];
  double started = 0;
  for (int i = 0; i < 2; ++i) {
    started = now_s();
    char* why = run_model(model, outputs);
    if (why) fail("runtime", format("%s failed while it was timed: %s", model->name, why), "");
    if (i == 0) release_values(outputs, model->output_count);
  }
  double ms = (now_s() - started) * 1e3;
  release_values(outputs, model->output_count);
  return ms;
}

static double warm_up(Model* model, double least_s) {
  double started = now_s();
  int turns = 0;
  while (turns < 2 || now_s() - started < least_s) turn_ms(model), ++turns;
  return (now_s() - started) / turns;
}

// In a race those go on a quarter of whose turns are about as fast as the slowest quarter of the fastest one's.
static void drop_slow(const Run* run, Block* block, int* running) {
  int leader = -1;
  for (int k = 0; k < run->count; ++k)
    if (running[k] && (leader < 0 || quantile_of(block->ms[k], block->counts[k], 0.5) <
                                         quantile_of(block->ms[leader], block->counts[leader], 0.5)))
      leader = k;
  int count = block->counts[leader];
  double* ordered =
      memcpy(allocate(sizeof *ordered * (size_t)count), block->ms[leader], sizeof *ordered * (size_t)count);
  qsort(ordered, (size_t)count, sizeof *ordered, ascending);
  double behind = ordered[count - 1 - count / 4];
  for (int k = 0; k < run->count; ++k)
    if (running[k] && quantile_of(block->ms[k], block->counts[k], 0.25) > 1.1 * behind) running[k] = 0;
  free(ordered);
}

static void time_block(const Run* run, Block* block, int first, int rounds) {
  int running[kMostModels], left = run->count;
  for (int k = 0; k < run->count; ++k) running[k] = 1, block->ms[k] = allocate(sizeof(double) * (size_t)rounds);
  block->before = read_clocks();
  for (int i = first; i < first + rounds && (!run->is_race || left > 1 || i == first); ++i) {
    for (int step = 0; step < run->count; ++step) {
      int k = i % 2 ? run->count - 1 - step : step;
      if (running[k]) block->ms[k][block->counts[k]++] = turn_ms(models[run->models[k]]);
    }
    if (!run->is_race || i + 1 - first < kRaceRounds) continue;
    drop_slow(run, block, running);
    for (int k = left = 0; k < run->count; ++k) left += running[k];
  }
  block->after = read_clocks();
}

// Say of every block why it does not count: its clock or temperature changed, or is not that of the others.
static int mark_drift(Block* blocks, int count) {
  double mhz[256], work[256];
  int kept = 0;
  for (int i = 0; i < count; ++i) mhz[i] = blocks[i].after.mhz, work[i] = blocks[i].after.work_ms;
  double typical_mhz = quantile(mhz, count, 0.5), typical_work = quantile(work, count, 0.5);
  for (int i = 0; i < count; ++i) {
    Clocks before = blocks[i].before, after = blocks[i].after;
    double pairs[4][2] = {{before.mhz, after.mhz},
                          {typical_mhz, after.mhz},
                          {before.work_ms, after.work_ms},
                          {typical_work, after.work_ms}};
    blocks[i].drift[0] = 0;
    for (int k = 0; k < 4 && !blocks[i].drift[0]; ++k)
      if (fabs(pairs[k][1] / pairs[k][0] - 1) > 0.1)
        snprintf(blocks[i].drift, sizeof blocks[i].drift,
                 k < 2 ? "clock %.0f MHz, then %.0f" : "fixed work took %.2f ms, then %.2f", pairs[k][0], pairs[k][1]);
    if (!blocks[i].drift[0] && fabs(after.celsius - before.celsius) > 5)
      snprintf(blocks[i].drift, sizeof blocks[i].drift, "%.0f °C, then %.0f", before.celsius, after.celsius);
    kept += !blocks[i].drift[0];
  }
  return kept;
}

static void put_clocks(const char* name, Clocks clocks) {
  fprintf(result, "\"%s\": {\"work_ms\": %.17g", name, clocks.work_ms);
  if (!isnan(clocks.mhz)) fprintf(result, ", \"mhz\": %.17g", clocks.mhz);
  if (!isnan(clocks.celsius)) fprintf(result, ", \"celsius\": %.17g", clocks.celsius);
  fputs("}", result);
}

static void put_run(const Run* run, Block* blocks, int count, int kept) {
  fputs("{\"models\": [", result);
  for (int k = 0; k < run->count; ++k) fputs(k ? ", " : "", result), put_text(result, models[run->models[k]]->name);
  fputs("], \"blocks\": [", result);
  for (int i = 0; i < count; ++i) {
    fputs(i ? ", {\"ms\": {" : "{\"ms\": {", result);
    for (int k = 0; k < run->count; ++k) {
      fputs(k ? ", " : "", result), put_text(result, models[run->models[k]]->name), fputs(": [", result);
      for (int j = 0; j < blocks[i].counts[k]; ++j) fprintf(result, "%s%.17g", j ? ", " : "", blocks[i].ms[k][j]);
      fputs("]", result);
    }
    fputs("}, ", result), put_clocks("before", blocks[i].before), fputs(", ", result),
        put_clocks("after", blocks[i].after);
    fputs(", \"drift\": ", result), put_text(result, blocks[i].drift), fputs("}", result);
  }
  fputs("]}", result);
  for (int k = 0; k < run->count; ++k) {
    double* all = allocate(sizeof *all * (size_t)count * kMostRounds);
    int turns = 0;
    for (int i = 0; i < count; ++i)
      for (int j = 0; j < blocks[i].counts[k] && (!kept || !blocks[i].drift[0]); ++j) all[turns++] = blocks[i].ms[k][j];
    printf("{\"model\": "), put_text(stdout, models[run->models[k]]->name);
    printf(", \"median_ms\": %.6g, \"turns\": %d, \"blocks_rejected\": %d}\n", quantile(all, turns, 0.5), turns,
           count - kept);
    free(all);
  }
}

static void time_run(Run* run) {
  double pace = 0;
  int able = 0;
  for (int k = 0; k < run->count; ++k)
    if (!models[run->models[k]]->why_not) run->models[able++] = run->models[k];
  run->count = able;
  for (int k = 0; k < able; ++k) pace += warm_up(models[run->models[k]], run->seconds / 4 / able);
  double fit = able ? run->seconds * 0.75 / pace : 0;
  int rounds = (int)fmin(fmax(fit, run->least_rounds), kMostRounds), wanted = able ? run->blocks : 0;
  int per_block = run->is_race || rounds < run->blocks ? (run->is_race ? rounds : 1) : rounds / run->blocks, count = 0,
      kept = 0;
  Block* blocks = allocate(sizeof *blocks * (size_t)(kSpareBlocks * wanted + 1));
  while (wanted && kept < wanted && count < (run->is_race ? 1 : kSpareBlocks * wanted) && count < 256) {
    time_block(run, &blocks[count], count * per_block, per_block);
    kept = mark_drift(blocks, ++count);
  }
  put_run(run, blocks, count, kept);
}

int main(int argc, char** argv) {
  if (argc < 2 || argc > 3) {
    fputs("usage: bench LIBONNXRUNTIME [FOLDER]\n", stderr);
    return 2;
  }
  char* library = realpath(argv[1], NULL);  // a bare name is sought where the system has its libraries
  if (argc > 2 && chdir(argv[2])) {
    fprintf(stderr, "error: the folder `%s` cannot be opened\n", argv[2]);
    return 2;
  }
  static Run runs[64];
  int run_count = read_bundle(runs, 64), compared = 0, failed = 0;
  const char* version = load_runtime(library ? library : argv[1]);
  result = fopen("result.json.partial", "w");
  if (!result) fail("disk", format("result.json cannot be written"), "free some space");
  fputs("{\"result_version\": 1, \"runtime\": ", result), put_text(result, version), fputs(", \"outputs\": [", result);
  for (int i = 0; i < model_count; ++i) {
    OrtObject* outputs[kMostTensors] = {0};
    models[i]->why_not = load_model(models[i]);
    if (!models[i]->why_not) models[i]->why_not = run_model(models[i], outputs);
    failed += models[i]->why_not != NULL;
    for (size_t k = 0; !models[i]->why_not && k < models[i]->output_count; ++k)
      if (models[i]->outputs[k].file) compare(models[i], &models[i]->outputs[k], outputs[k], &compared);
    release_values(outputs, models[i]->output_count);
  }
  fputs("], \"why_not\": {", result);
  for (int i = 0, told = 0; i < model_count; ++i)
    if (models[i]->why_not) {
      fputs(told++ ? ", " : "", result), put_text(result, models[i]->name), fputs(": ", result),
          put_text(result, models[i]->why_not);
      printf("{\"model\": "), put_text(stdout, models[i]->name), printf(", \"why_not\": "),
          put_text(stdout, models[i]->why_not), puts("}");
    }
  fputs("}, ", result), put_clocks("before", read_clocks()), fputs(", \"runs\": [", result);
  for (int i = 0; i < run_count && !differs; ++i) fputs(i ? ", " : "", result), time_run(&runs[i]);
  fputs("], ", result), put_clocks("after", read_clocks()), fputs(", \"failure\": null}\n", result);
  if (fclose(result) || rename("result.json.partial", "result.json"))
    fail("disk", format("result.json cannot be written"), "free some space");
  return differs || failed ? 1 : 0;
}
