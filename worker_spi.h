/* -------------------------------------------------------------------------
 *
 * worker_spi.h
 *		What the rooms of the house share, and all that depends on the
 *		server's version.
 *
 *			worker_spi.c	the module as the server and the user see it
 *			wake.c			the trigger that wakes a worker at commit
 *			worker.c		the life of a worker process
 *			slot.c			shared memory: one slot for each worker
 *			fold.c			the job: what this worker does and no other
 *
 * Calls go down this list only: worker_spi.c and wake.c call slot.c, worker.c
 * calls slot.c and the job.  fold.h says what the job is made of.
 *
 * -------------------------------------------------------------------------
 */
#ifndef WORKER_SPI_H
#define WORKER_SPI_H

#include "mb/pg_wchar.h"
#include "postmaster/bgworker_internals.h"
#include "storage/latch.h"
#include "storage/lock.h"
#include "utils/acl.h"
#include "utils/timestamp.h"

/* -------------------------------------------------------------------------
 * All that depends on the server's version
 * -------------------------------------------------------------------------
 */

#if PG_VERSION_NUM < 150000
#error "worker_spi requires PostgreSQL 15 or later"
#endif

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

/* 18 has I/O under way to be given up after an error. */
#if PG_VERSION_NUM >= 180000
#include "storage/aio_subsys.h"
#else
#define pgaio_error_cleanup() ((void) 0)
#endif

/* 18 built for it lets a test stop or fail a process between two lines. */
#if PG_VERSION_NUM >= 180000
#include "utils/injection_point.h"
#define injection_point(name) INJECTION_POINT(name, NULL)
#else
#define injection_point(name) ((void) 0)
#endif

/* 19 has a level of the server log for each kind of process. */
#if PG_VERSION_NUM >= 190000
#include "utils/tuplestore.h"
#include "utils/wait_event.h"
#define my_log_min_messages log_min_messages[MyBackendType]
#else
#define my_log_min_messages log_min_messages
#endif

/*
 * 19 terminates an interruptible worker when its database is wanted, and
 * forgets it; before, such a worker finds that out and leaves by itself.
 */
#ifdef BGWORKER_INTERRUPTIBLE
#define SERVER_INTERRUPTS_WORKERS true
#else
#define SERVER_INTERRUPTS_WORKERS false
#define BGWORKER_INTERRUPTIBLE 0
#endif

/*
 * Only the functions that the server looks up by name are to be visible.  15
 * shows everything that is not told otherwise, and the first of two libraries
 * with the same name for something would serve both.
 */
#if defined(__GNUC__)
#pragma GCC visibility push(hidden)
#endif

/* -------------------------------------------------------------------------
 * Settings, defined in worker_spi.c
 * -------------------------------------------------------------------------
 */

extern int	worker_spi_naptime;
extern char *worker_spi_database;
extern char *worker_spi_role;
extern int	worker_spi_restart_interval;

/* only counters: begin */
extern bool worker_spi_log_folds;
extern int	worker_spi_wake_delay;
extern bool worker_spi_notify;

/* only counters: end */

/* -------------------------------------------------------------------------
 * Shared memory, in slot.c
 * -------------------------------------------------------------------------
 */

/* What is kept of an error for processes that want to pass it on. */
#define ERROR_TEXT_SIZE		256

typedef struct WorkerError
{
	int			sqlstate;		/* 0 if there was no error */
	char		message[ERROR_TEXT_SIZE];
	char		detail[ERROR_TEXT_SIZE];	/* empty if there is none */
	char		hint[ERROR_TEXT_SIZE];	/* the same */
} WorkerError;

/* Copy as much as there is room for, cut between characters; NULL is "". */
static inline void
copy_error_text(char *target, const char *source)
{
	int			len = source ? strlen(source) : 0;

	len = pg_mbcliplen(source, len, ERROR_TEXT_SIZE - 1);
	memcpy(target, source ? source : "", len);
	target[len] = '\0';
}

static inline void
copy_error(WorkerError *error, const ErrorData *edata)
{
	error->sqlstate = edata->sqlerrcode;
	copy_error_text(error->message, edata->message);
	copy_error_text(error->detail, edata->detail);
	copy_error_text(error->hint, edata->hint);
}

/*
 * What a worker must know to start.  It travels in bgw_extra, so that the
 * postmaster can hand it to each process that it starts for the registration,
 * however often.
 */
typedef struct WorkerParams
{
	uint64		generation;		/* of the registration; 0 without slots */
	int32		index;			/* tells the workers of a database apart */
	Oid			dboid;			/* database; invalid for a static worker */
	Oid			roleoid;		/* role; invalid for a static worker */
	uint32		connflags;		/* BGWORKER_BYPASS_* */
	bool		is_static;		/* registered at server start? */
	bool		interruptible;	/* leave for good if the database is wanted? */
	NameData	database;		/* of a static worker; else empty */
} WorkerParams;

StaticAssertDecl(sizeof(WorkerParams) <= BGW_EXTRALEN,
				 "WorkerParams must fit into bgw_extra");

/* The states of a worker; a diagram stands at the top of slot.c. */
typedef enum WorkerState
{
	WORKER_STARTING,			/* being launched, or not yet ready */
	WORKER_IDLE,				/* napping */
	WORKER_BUSY,				/* in a cycle */
	WORKER_BACKOFF,				/* napping; the last cycle failed */
	WORKER_DOWN,				/* no process; the server will start one */
	WORKER_STOPPED				/* a static one that nobody will start */
} WorkerState;

/* What the view shows of a slot. */
typedef struct WorkerStatus
{
	WorkerParams params;
	WorkerState state;
	pid_t		pid;			/* 0 if there is no process */
	Oid			dboid;			/* database; invalid if not connected */
	Oid			roleoid;		/* role; the same */
	TimestampTz worker_start;	/* start of the current process, or last */
	int64		starts;			/* processes that there were */
	TimestampTz done_until;		/* all there was then is done, or left over */
	int64		rows_left;		/* what could not be done */
	int64		cycles;			/* cycles that did something */
	int64		rows_done;		/* what they did */
	TimestampTz last_done_time; /* end of the last of them */
	double		last_done_ms;	/* how long it took */
	int64		failed_count;	/* cycles that failed, and errors at exit */
	TimestampTz last_failed_time;
	WorkerError last_error;
	TimestampTz next_cycle_time;	/* 0 if not known */
} WorkerStatus;

/* Names one registration for good: a slot may be used again by another. */
typedef struct SlotRef
{
	int			slotno;			/* -1 without shared memory */
	uint64		generation;
} SlotRef;

/* only counters: begin */

/* Where a worker was found that is to be woken; true while nothing changes. */
typedef struct SlotHint
{
	uint64		changes;
	int			slotno;			/* -1 if there is no such worker */
} SlotHint;

/* only counters: end */

typedef enum ReserveResult
{
	RESERVE_OK,
	RESERVE_DUPLICATE,			/* such a worker is there already */
	RESERVE_FULL				/* there is no slot left */
} ReserveResult;

/* What became of a ticket. */
typedef enum SlotAnswer
{
	ANSWER_PENDING,				/* the cycle is not over */
	ANSWER_WELL,				/* all is done that was committed before it */
	ANSWER_FAILED				/* the cycle has failed, or the worker exited */
} SlotAnswer;

/* What a napping worker is to do. */
typedef enum NapOrder
{
	NAP_ON,
	NAP_WORK_NOW,				/* somebody waits for a cycle */
	NAP_STOP					/* leave for good */
} NapOrder;

/* How a change of the list of databases concerns a static worker. */
typedef enum ListResult
{
	LIST_STAY,					/* its database is in the list */
	LIST_MOVE,					/* it has taken over one that nobody serves */
	LIST_LEAVE					/* there is nothing for it to do */
} ListResult;

/* For the postmaster, at server start, and for the setting's check hook */
extern void slot_init(int nstatic, const WorkerParams *params);
extern const char *slot_parse_list(const char *setting, List **names);

/* For backends */
extern bool slot_have_memory(void);
extern int	slot_count(void);
extern bool slot_get_status(int slotno, WorkerStatus *status);
extern bool slot_find(int index, Oid dboid, const char *dbname, SlotRef *ref);
extern ReserveResult slot_reserve(WorkerParams *params, Oid dboid,
								  const char *dbname, SlotRef *ref);
extern bool slot_launched(const SlotRef *ref, const WorkerParams *params);
extern bool slot_launch_error(const SlotRef *ref, WorkerError *error);
extern void slot_unreserve(const SlotRef *ref);
extern uint64 slot_ask(const SlotRef *ref);
extern SlotAnswer slot_wait(const SlotRef *ref, uint64 ticket, long timeout,
							uint32 wait_event, WorkerError *error);
extern pid_t slot_stop(const SlotRef *ref);
extern void slot_wait_stopped(const SlotRef *ref);

/* only counters: begin */
extern void slot_wake(int index, Oid dboid, SlotHint *hint);

/* only counters: end */

/* For the worker itself */
extern bool slot_attach(int slotno, const WorkerParams *params);
extern int	slot_connect_failures(void);
extern void slot_starting(void);
extern const char *slot_database(void);
extern ListResult slot_follow_list(const char *setting);
extern bool slot_connected(Oid dboid, Oid roleoid);
extern int	slot_resume(TimestampTz *due, int *sqlstate);
extern bool slot_start_afresh(int failures, TimestampTz due, int minutes);
extern bool slot_may_make(void);
extern void slot_has_made(void);
extern void slot_keep(void);
extern bool slot_has_launcher(void);
extern bool slot_is_stopping(void);
extern bool slot_begin_cycle(void);
extern void slot_ready(void);
extern void slot_progress(int64 rows_done, int64 rows_left);
extern void slot_end_cycle(TimestampTz start, TimestampTz next,
						   const WorkerError *failed, const WorkerError *left);
extern void slot_note_error(const WorkerError *error);
extern NapOrder slot_nap(TimestampTz next);

/* only counters: begin */
extern bool slot_woken(void);

/* only counters: end */
extern bool slot_detach(bool for_good, const WorkerError *error);
extern void slot_forget(const WorkerParams *params);

/* -------------------------------------------------------------------------
 * The contract between a worker and its job
 * -------------------------------------------------------------------------
 *
 * worker.c can run any job that has these four functions.  A cycle is a series
 * of transactions, each a share of the job.  Between two of them, also after
 * one that has failed, the worker looks whether it is to stop, to read its
 * settings again or to give way, so a share is not to take long.
 *
 * job_init(index) is called once in the life of a process, outside a
 * transaction, and prepares for the work of worker number index.  It returns
 * the name, in memory that lasts, of the table that the log is to name.
 *
 * job_step(progress) does a share.  The transaction is begun, SPI is connected,
 * and there is no snapshot yet; the caller commits.  Isolation level and
 * synchronous_commit are the job's to set.  The memory context that is current
 * lasts until then.  Returns whether there is more to do.  Of progress, which
 * is zeroed before each step, the first two say something to the job, and the
 * rest is for it to say; of again_ms and pending_error, what the last step of a
 * cycle says counts:
 *
 *		may_make		what the job works on may be made, if it is missing
 *		asked			somebody waits for this cycle: try again now what was
 *						left over
 *		tables_ready	what it works on is there: who launched us may go on
 *		rows_done		what this share has done
 *		rows_left		what is left over for now, in all
 *		again_ms		when the cycle is over: come again after so many
 *						milliseconds at the latest; 0: after the naptime
 *		pending_error	why something is left over; raised to whoever waits for
 *						the cycle, which has gone well all the same
 *		undo			roll this share back; that is no error, and more is to
 *						be done
 *
 * job_committed() is called when a share is committed.  Only here does anything
 * become true that a share has found out: a rollback does not put back static
 * variables.
 *
 * job_failed(error) is called when a share was rolled back over an error, with
 * interrupts held.  True: go on with the cycle; if anybody tells of the error,
 * it is the job.  False: the cycle has failed, and the next step begins
 * another.  It is not called where the worker was told to stop, nor for an
 * error that came between two shares: that ends no cycle.
 */
typedef struct JobProgress
{
	bool		may_make;
	bool		asked;
	bool		tables_ready;
	bool		undo;
	int			again_ms;
	int64		rows_done;
	int64		rows_left;
	WorkerError pending_error;	/* sqlstate 0 if there is none */
} JobProgress;

extern const char *job_init(int index);
extern bool job_step(JobProgress *progress);
extern void job_committed(void);
extern bool job_failed(const WorkerError *error);

#if defined(__GNUC__)
#pragma GCC visibility pop
#endif

/* -------------------------------------------------------------------------
 * What the server looks up by name
 * -------------------------------------------------------------------------
 */

extern PGDLLEXPORT void worker_spi_main(Datum main_arg);

#endif							/* WORKER_SPI_H */
