// The attention that the instruction set at hand allows.
#pragma once
#include "tiles.h"
#if MLA_TILES
#include "attention_tiles.h"
#elif MLA_DOT_BF16
#include "attention_pairs.h"
#else
#include "attention_fp32.h"
#endif
