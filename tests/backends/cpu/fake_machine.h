// Makes dispatch.cpp ask a made-up machine what it has, and not this one.
#pragma once

bool machine_has(const char* feature);
#define __builtin_cpu_init() static_cast<void>(0)
#define __builtin_cpu_supports(feature) machine_has(feature)
#define __builtin_cpu_is(name) false
