"""Servers, processes, proxies, files and whole runs for the tests and the benchmarks."""
