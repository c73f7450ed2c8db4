// The attention that the instruction set at hand allows.
#pragma once
#include "tiles.h"
#if MLA_TILES
#include "attend_tiles.h"
#else
#include "attend_vectors.h"
#endif
