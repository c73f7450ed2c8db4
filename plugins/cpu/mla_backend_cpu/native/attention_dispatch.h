// The attention that the instruction set at hand allows.
#pragma once
#include "tiles.h"
#if MLA_TILES
#include "attention_tiles.h"
#else
#include "attention_vectors.h"
#endif
