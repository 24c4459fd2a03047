#pragma once
#include "prefill_sparse.cuh"
