/* -------------------------------------------------------------------------
 *
 * worker_spi.h
 *		What the two halves of worker_spi share: worker_spi.c, which runs in
 *		the postmaster and in backends, and worker.c, which is the worker.
 *
 * -------------------------------------------------------------------------
 */
#ifndef WORKER_SPI_H
#define WORKER_SPI_H

#include "postmaster/bgworker_internals.h"
#include "storage/condition_variable.h"
#include "storage/latch.h"
#include "storage/lock.h"
#include "storage/lwlock.h"
#include "utils/acl.h"
#include "utils/timestamp.h"

#if PG_VERSION_NUM < 150000
#error "worker_spi requires PostgreSQL 15 or later"
#endif

#if PG_VERSION_NUM >= 190000
#include "utils/wait_event.h"
#endif

/* -------------------------------------------------------------------------
 * All that depends on the server's version
 * -------------------------------------------------------------------------
 */

/* 16 split "is a member" into its uses; SET ROLE is the one meant here. */
#if PG_VERSION_NUM >= 160000
#define can_act_as(member, role) member_can_set_role(member, role)
#define database_aclcheck(dboid, roleid, mode) \
	object_aclcheck(DatabaseRelationId, dboid, roleid, mode)
#else
#define can_act_as(member, role) is_member_of_role(member, role)
#define database_aclcheck(dboid, roleid, mode) \
	pg_database_aclcheck(dboid, roleid, mode)
#endif

/* 17 lets a module name what its processes wait for. */
#if PG_VERSION_NUM >= 170000
#define define_wait_event(name) WaitEventExtensionNew(name)
#else
#define define_wait_event(name) PG_WAIT_EXTENSION
#endif

/* 18 made the postmaster's list of registered workers a doubly linked one. */
#if PG_VERSION_NUM >= 180000
typedef dlist_iter registered_iter;
#define registered_foreach(iter) dlist_foreach(iter, &BackgroundWorkerList)
#define registered_worker(iter) \
	dlist_container(RegisteredBgWorker, rw_lnode, (iter).cur)
#else
typedef slist_iter registered_iter;
#define registered_foreach(iter) slist_foreach(iter, &BackgroundWorkerList)
#define registered_worker(iter) \
	slist_container(RegisteredBgWorker, rw_lnode, (iter).cur)
#endif

/* -------------------------------------------------------------------------
 * Types
 * -------------------------------------------------------------------------
 */

#define ERROR_TEXT_SIZE		256

/*
 * What a worker must know to start.  It travels in bgw_extra, so that the
 * postmaster can hand it to each process it starts for the registration,
 * however often.
 */
typedef struct WorkerParams
{
	uint64		generation;		/* of the slot; 0 without shared memory */
	int32		index;			/* N of schemaN */
	Oid			dboid;			/* database; invalid for a static worker */
	Oid			roleoid;		/* role; invalid for a static worker */
	uint32		connflags;		/* BGWORKER_BYPASS_* */
	bool		is_static;		/* registered at server start? */
	bool		interruptible;	/* leave for good if the database is wanted? */
} WorkerParams;

StaticAssertDecl(sizeof(WorkerParams) <= BGW_EXTRALEN,
				 "WorkerParams must fit into bgw_extra");

/*
 * The states of a registered worker.
 *
 *		(free) --launch, server start--> STARTING
 *		STARTING --table adopted--> FOLDING --done--> IDLE --due--> FOLDING
 *		STARTING, FOLDING --error--> BACKOFF --due--> STARTING, FOLDING
 *		any --exit code 1--> STARTING, without a pid, until restarted
 *		any --exit code 0--> (free)
 *
 * The worker's own process makes all these transitions, the last two in its
 * exit callback, but for some while there is no process: a launch occupies the
 * slot and, if it fails, frees it again, and worker_spi_stop() frees it.  The
 * next process of the registration, if there is one, finds another generation
 * in the slot and leaves.  worker_spi_fold() may take a ticket at any time.
 *
 * A process that dies without running its exit callback takes all of shared
 * memory with it: the postmaster then ends every process and calls
 * startup_shmem() again.
 */
typedef enum WorkerState
{
	WORKER_STARTING,			/* no process, or one that is not yet ready */
	WORKER_IDLE,				/* napping */
	WORKER_FOLDING,				/* in a cycle */
	WORKER_BACKOFF				/* the last cycle failed; napping */
} WorkerState;

/* What a worker says of an error to processes that want to pass it on. */
typedef struct WorkerError
{
	int			sqlstate;		/* 0 if there was no error */
	char		message[ERROR_TEXT_SIZE];
	char		detail[ERROR_TEXT_SIZE];	/* empty if there is none */
	char		hint[ERROR_TEXT_SIZE];	/* the same */
} WorkerError;

/*
 * One for each registered worker.  It outlives the worker's processes, and
 * with it the counters; the generation tells a process whether the slot is
 * still that of its own registration.
 */
typedef struct WorkerSlot
{
	uint64		generation;		/* of the registration; 0 if free */
	WorkerParams params;		/* copy of bgw_extra */
	WorkerState state;
	pid_t		pid;			/* 0 if there is no process */
	Latch	   *latch;			/* the process's, if there is one */
	Latch	   *launcher;		/* latch of a backend waiting for readiness */
	Oid			dboid;			/* database; invalid if not known now */
	Oid			roleoid;		/* role; invalid if not known now */
	int64		starts;			/* processes that the slot has had */
	TimestampTz worker_start;	/* start of the current process, or last */
	bool		stop;			/* worker_spi_stop() wants it gone */

	/* worker_spi_fold() takes a ticket, a cycle serves all taken before it */
	uint64		fold_requested; /* last ticket handed out */
	uint64		fold_done;		/* last ticket served, well or badly */
	uint64		fold_ok;		/* last ticket served well */

	/* for the view */
	int64		fold_count;		/* cycles that folded something */
	int64		folded_rows;	/* deltas folded */
	TimestampTz last_fold_time; /* end of the last cycle that folded */
	double		last_fold_ms;	/* how long it took */
	int64		failed_count;	/* cycles that failed, and errors at exit */
	TimestampTz last_failed_time;
	WorkerError last_error;
	TimestampTz next_fold_time; /* 0 if not known */

	/* these two outlast the registration: somebody may still look at them */
	pg_atomic_uint32 wake;		/* a commit wants its deltas folded soon */
	ConditionVariable changed;	/* broadcast when served, and at exit */
} WorkerSlot;

typedef struct WorkerSpiShared
{
	LWLock	   *lock;			/* guards all that follows, but for wake */
	uint64		last_generation;	/* of the newest registration */
	int			nslots;
	WorkerSlot	slots[FLEXIBLE_ARRAY_MEMBER];
} WorkerSpiShared;

/*
 * Without shared memory, a worker holds this advisory lock for life, and a
 * launcher holds it until it sees the worker queue up for it.
 */
#define LAUNCH_LOCK_CLASS	0x5753	/* marks our locks in pg_locks */
#define SET_LOCKTAG_WORKER(tag, dboid, index) \
	SET_LOCKTAG_ADVISORY(tag, dboid, index, 0, LAUNCH_LOCK_CLASS)

/* -------------------------------------------------------------------------
 * Shared state and settings, defined in worker_spi.c
 * -------------------------------------------------------------------------
 */

extern WorkerSpiShared *Shared; /* NULL when the library is not preloaded */

extern int	worker_spi_naptime;
extern char *worker_spi_database;
extern char *worker_spi_role;
extern bool worker_spi_log_folds;
extern int	worker_spi_wake_delay;
extern bool worker_spi_notify;

extern void free_slot(WorkerSlot *slot);
extern char *role_name(Oid roleoid);

/* -------------------------------------------------------------------------
 * The worker, in worker.c
 * -------------------------------------------------------------------------
 */

extern WorkerSlot *MySlot;		/* NULL in other processes */

extern PGDLLEXPORT void worker_spi_main(Datum main_arg);

#endif							/* WORKER_SPI_H */
