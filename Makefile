MODULE_big = worker_spi
OBJS = worker_spi.o worker.o
EXTENSION = worker_spi
DATA = worker_spi--1.0.sql
PGFILEDESC = "worker_spi - fold the deltas of a counter in the background"

REGRESS = worker_spi keys operate
TAP_TESTS = 1

PG_CONFIG ?= pg_config
PGXS := $(shell $(PG_CONFIG) --pgxs)
include $(PGXS)
