// The loops of matrix registers, see MatrixLoops in tile.h.
#include "tile_matrix.h"

#include "processor.h"

namespace slrc {
namespace {

constexpr uint32_t kCompiledFor = 0 SLRC_FEATURES(SLRC_USED);

}  // namespace

extern const MatrixLoops SLRC_TILE_SET = {
    SLRC_TILE_NAME,
    kCompiledFor,
    {{RunMatrices<0, kLanes>, RunMatrices<1, kLanes>, RunMatrices<2, kLanes>},
     {RunMatrices<0, kLanes / 2>, RunMatrices<1, kLanes / 2>, RunMatrices<2, kLanes / 2>},
     {}},
};

}  // namespace slrc
