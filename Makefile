# Built with PGXS; PG_CONFIG chooses the server.  "make help" lists the targets.

MODULE_big = worker_spi
OBJS = worker_spi.o wake.o worker.o slot.o fold.o stuck.o table.o
EXTENSION = worker_spi
DATA = worker_spi--1.0.sql
PGFILEDESC = "worker_spi - fold the deltas of a counter in the background"

REGRESS = worker_spi keys operate
TAP_TESTS = 1

PG_CONFIG ?= pg_config
PGXS := $(shell $(PG_CONFIG) --pgxs)
include $(PGXS)

$(OBJS): worker_spi.h
fold.o stuck.o table.o: fold.h

.PHONY: help
help:
	@echo 'make                      build for the server of PG_CONFIG'
	@echo 'make install              install into that server'
	@echo 'make installcheck         all tests: sql/ in the running server, t/ in their own'
	@echo '     REGRESS=keys         only this regression test'
	@echo '     PROVE_TESTS=t/x.pl   only this TAP test'
	@echo 'make clean                remove what was built'
	@echo 'dev/demo                  show on a throw-away server what it does'
	@echo 'dev/test                  all tests, with all their set-up; VERSION=17 or PG_CONFIG for another server'
	@echo 'dev/indent, dev/lint      format; check without running'
	@echo 'dev/valgrind              run the regression tests under memcheck'
	@echo 'dev/new NAME FOLDER       begin an extension with a worker of your own'
	@echo 'bench/run                 measure'
