// For the worst error of many numbers.
#pragma once

// The larger one, or NaN if either is: std::max would lose it, and every bound hold.
inline double larger(double a, double b) { return a >= b || a != a ? a : b; }
