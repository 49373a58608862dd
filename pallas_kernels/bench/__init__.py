"""The kernels beside those that people use today: on TPUs by the compiler's schedules, on this CPU by time."""
