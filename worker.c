/* -------------------------------------------------------------------------
 *
 * worker.c
 *		The life of a background worker process, from start to exit.
 *
 * This file is what every background worker needs; what this one is for, its
 * job, is behind the four functions of the contract in worker_spi.h.  A worker
 * of one's own brings another job and keeps this file.  In the order of a life:
 *
 *		start		signals, a slot in shared memory, the exit callback
 *		connect		once, to one database, as one role; pin the settings
 *		loop		sleep until there is something to do, run a cycle, again
 *		cycle		a series of short transactions, each a share of the job
 *		recover		what raises, wherever in the loop, leads back to the loop
 *		exit		with code 1, "start me again", or 0, "forget about me"
 *
 * Copyright (c) 2026, worker_spi contributors
 *
 * -------------------------------------------------------------------------
 */

#include "postgres.h"

#include "access/xact.h"
#include "catalog/pg_authid.h"
#include "catalog/pg_database.h"
#include "common/pg_prng.h"
#include "executor/spi.h"
#include "miscadmin.h"
#include "pgstat.h"
#include "postmaster/interrupt.h"
#include "storage/bufmgr.h"
#include "storage/condition_variable.h"
#include "storage/fd.h"
#include "storage/ipc.h"
#include "storage/lwlock.h"
#include "storage/pmsignal.h"
#include "storage/proc.h"
#include "storage/smgr.h"
#include "tcop/tcopprot.h"
#include "utils/guc.h"
#include "utils/hsearch.h"
#include "utils/memutils.h"
#include "utils/resowner.h"
#include "utils/syscache.h"
#include "utils/timeout.h"
#include "worker_spi.h"

/* -------------------------------------------------------------------------
 * Types and constants
 * -------------------------------------------------------------------------
 */

/* How often we look for a command that wants the database, and how long. */
#define DATABASE_PROBE_MS	1000
#define DATABASE_WAIT_MS	200

#define MIN_BACKOFF_MS		1000
#define MAX_BACKOFF_MS		60000
#define ERROR_PAUSE_US		100000L /* after any error, lest we spin */
#define MAX_CONNECT_MS		60000	/* from one try to connect to the next */

/* When a process ends to start afresh: see fail_cycle(). */
#define AFRESH_FAILURES		7
#define AFRESH_MINUTES		10
#define AFRESH_RESTART_S	60

#define MAX_LOGGED_ERRORS	16

/* The cycle that is under way, or the last one, and when the next is due. */
typedef struct CycleState
{
	bool		running;		/* begun, and neither over nor failed? */
	bool		asked;			/* does somebody wait for it? */
	TimestampTz start;			/* when it began */
	TimestampTz end;			/* when it went through or failed */
	int			again_ms;		/* from its end to the next at most; or 0 */
	int			failures;		/* cycles that failed in a row */
	int			failed_sqlstate;	/* of the last of them */
	int			delay_ms;		/* from its end to the next */
	/* only counters: begin */
	TimestampTz sooner;			/* when a commit wants the next; DT_NOEND */
	/* only counters: end */
} CycleState;

/* -------------------------------------------------------------------------
 * State
 * -------------------------------------------------------------------------
 */

static WorkerParams params;		/* from bgw_extra */
static const char *job_name;	/* what the job works on, for the log */
static char *connected_role;	/* setting that a static worker started with */
static char *connected_list;	/* the same */
static bool connected = false;	/* are we past what can only fail for good? */
static bool ready = false;		/* has a transaction of the job gone through? */
static CycleState cycle = {.end = DT_NOBEGIN};
static bool in_share = false;	/* in a transaction of the job? */
static MemoryContext cycle_context;
static TimestampTz next_probe = 0;	/* when to look for DROP DATABASE */
static uint32 nap_wait_event;

/* Errors that the log has seen since the last cycle that went through. */
static int	logged_errors[MAX_LOGGED_ERRORS];
static int	num_logged_errors = 0;

/* The error that this process is about to die of. */
static WorkerError fatal_error;
static emit_log_hook_type prev_emit_log_hook = NULL;

static void start_process(int slotno);
static void wait_to_connect(void);
static void connect_to_database(void);
static void pin_settings(void);
static void recover(void);
static void nap(void);
static void run_cycle(void);
static void end_cycle(const JobProgress *progress);
static void fail_cycle(const WorkerError *error);
static TimestampTz next_cycle(TimestampTz now);
static void release_session_locks(void);
static void report_statistics(void);
static void exit_callback(int code, Datum arg);
static void remember_fatal_error(ErrorData *edata);
static bool database_is_free(void);
static void leave_if_database_is_wanted(void);
static void reload_settings(void);

/* -------------------------------------------------------------------------
 * The life of the process
 * -------------------------------------------------------------------------
 */

/*
 * Entry point of every worker; main_arg is the number of its slot.
 *
 * It must not be static and needs PGDLLEXPORT: the postmaster's child looks it
 * up by name.
 */
void
worker_spi_main(Datum main_arg)
{
	sigjmp_buf	boundary;

	start_process(DatumGetInt32(main_arg));
	wait_to_connect();
	connect_to_database();
	job_name = job_init(params.index);

	/*
	 * The boundary.  The server's own one around us ends the process; from
	 * here on, whatever raises an error, be it in the middle of a statement
	 * or in a log line while we nap, brings us back to this place and into
	 * the loop.  It is PG_TRY without an end, as in autovacuum.c.
	 */
	if (sigsetjmp(boundary, 1) != 0)
		recover();
	PG_exception_stack = &boundary;

	for (;;)
	{
		slot_keep();

		/* One that goes on after an error does so at once. */
		if (!cycle.running)
			nap();
		run_cycle();
	}
}

/*
 * Before the connection: signals, our slot, and what cleans it up.
 */
static void
start_process(int slotno)
{
	memcpy(&params, MyBgworkerEntry->bgw_extra, sizeof(params));

	/*
	 * Signals are blocked until now, so that none is lost before there is a
	 * handler for it.  The default for SIGTERM does not respect critical
	 * sections; die() sets a flag that CHECK_FOR_INTERRUPTS() acts upon, and
	 * so ends a running statement as well.  SIGHUP would be ignored.
	 */
	pqsignal(SIGHUP, SignalHandlerForConfigReload);
	pqsignal(SIGTERM, die);

	/*
	 * What ends the process is told to whoever waits for it.  No PG_CATCH and
	 * no boundary sees a FATAL error, so the hook of the server log is the
	 * only place where its text can be had; and the hook sees only what the
	 * log's level lets through.
	 */
	if (my_log_min_messages > FATAL)
		SetConfigOption("log_min_messages", "fatal",
						PGC_SUSET, PGC_S_OVERRIDE);
	prev_emit_log_hook = emit_log_hook;
	emit_log_hook = remember_fatal_error;

	/*
	 * The exit callback is registered when there is something for it to clean
	 * up, and before anything can fail: one that stood earlier could clean up
	 * after a process that was not us.
	 */
	if (!slot_attach(slotno, &params))
		proc_exit(0);			/* stopped before it began */
	before_shmem_exit(exit_callback, (Datum) 0);

	/*
	 * A cancel ends a transaction of the job, and only while one is under
	 * way: run_share() lets it in there.  Everywhere else it would be an
	 * error without anything that it could end; while we connect, it would
	 * end the process.  A termination is not held.
	 */
	HOLD_CANCEL_INTERRUPTS();
	BackgroundWorkerUnblockSignals();
	injection_point("worker-spi-attached");
}

/*
 * If the processes before us could not connect, wait before we try: the server
 * starts the next one after its restart interval, and each leaves two lines in
 * the log.  The time from one try to the next doubles, up to a minute.  A
 * reload may have changed the cause, so it ends the wait.
 */
static void
wait_to_connect(void)
{
	int64		interval = worker_spi_restart_interval * INT64CONST(1000);
	int			failures = slot_connect_failures();
	TimestampTz due = GetCurrentTimestamp();

	if (failures > 0)
		due = TimestampTzPlusMilliseconds(due,
										  Max(Min(interval << Min(failures - 1, 6), MAX_CONNECT_MS) - interval, 0));
	for (;;)
	{
		long		timeout = TimestampDifferenceMilliseconds(GetCurrentTimestamp(), due);

		if (slot_is_stopping())
			proc_exit(0);
		if (ConfigReloadPending)
		{
			ConfigReloadPending = false;
			ProcessConfigFile(PGC_SIGHUP);
			break;
		}
		if (timeout <= 0)
			break;
		(void) WaitLatch(MyLatch,
						 WL_LATCH_SET | WL_TIMEOUT | WL_EXIT_ON_PM_DEATH,
						 Min(timeout, MAX_CONNECT_MS), PG_WAIT_EXTENSION);
		ResetLatch(MyLatch);
		CHECK_FOR_INTERRUPTS();
	}
	slot_starting();
}

/*
 * Connect.  This can be done once in the life of a process: a worker that is
 * to move to another database or role exits and is started again.
 *
 * An error raised here ends the process, since there is nothing yet that could
 * be done in its stead.
 */
static void
connect_to_database(void)
{
	TimestampTz due;

	if (params.is_static)
	{
		/* It may have changed while there was no process to see it change. */
		if (!slot_has_launcher() &&
			slot_follow_list(worker_spi_database) == LIST_LEAVE)
			proc_exit(0);
		connected_list = MemoryContextStrdup(TopMemoryContext,
											 worker_spi_database);
		connected_role = MemoryContextStrdup(TopMemoryContext,
											 worker_spi_role);
		BackgroundWorkerInitializeConnection(slot_database(),
											 connected_role[0] ? connected_role : NULL,
											 0);
	}
	else
	{
		/*
		 * Named by its OID, the bootstrap superuser would need LOGIN like any
		 * other role; the default, which is the same role, does not.
		 */
		BackgroundWorkerInitializeConnectionByOid(params.dboid,
												  params.roleoid == BOOTSTRAP_SUPERUSERID ? InvalidOid : params.roleoid,
												  params.connflags);
	}

	nap_wait_event = define_wait_event("WorkerSpiMain");

	/*
	 * A commit leaves us in TopMemoryContext, where whatever is allocated
	 * stays for the life of the process.  This one is emptied each time.
	 */
	cycle_context = AllocSetContextCreate(TopMemoryContext,
										  "worker_spi cycle",
										  ALLOCSET_DEFAULT_SIZES);

	StartTransactionCommand();

	/*
	 * The owner of a database may ALTER DATABASE ... SET role, and so choose
	 * whom the worker connects as.  Choose again.
	 */
	SetConfigOption("session_authorization",
					GetUserNameFromId(GetAuthenticatedUserId(), false),
					PGC_SUSET, PGC_S_OVERRIDE);
	SetConfigOption("role", "none", PGC_SUSET, PGC_S_OVERRIDE);

	/* A static one that comes back may find a dynamic one in its place. */
	if (!slot_connected(MyDatabaseId, GetUserId()))
	{
		bool		waits = params.is_static && !slot_has_launcher();

		ereport(waits ? LOG : FATAL,
				(errcode(ERRCODE_DUPLICATE_OBJECT),
				 errmsg("a worker with index %d already runs in this database",
						params.index)));
		proc_exit(0);
	}
	CommitTransactionCommand();
	pin_settings();
	connected = true;

	/* One that starts afresh waits as long as the process before would have. */
	cycle.failures = slot_resume(&due, &cycle.failed_sqlstate);
	if (cycle.failures > 0)
	{
		cycle.end = GetCurrentTimestamp();
		cycle.delay_ms = TimestampDifferenceMilliseconds(cycle.end, due);
	}
}

/*
 * Pin the settings that the worker relies on.  PGC_S_OVERRIDE keeps a reload,
 * and ALTER ROLE or ALTER DATABASE ... SET, from changing them again.
 */
static void
pin_settings(void)
{
	static const char *const pinned[][2] = {
		/* a name in a statement or trigger means what it says */
		{"search_path", "pg_catalog, pg_temp"},
		/* a row that row security hides would be lost: fail instead */
		{"row_security", "off"},
		/* a transaction does not wait for one that it could be confused by */
		{"default_transaction_deferrable", "off"},
		/* any other switches off triggers and foreign keys */
		{"session_replication_role", "origin"},
		/* no wait without end; give up before others find a deadlock */
		{"lock_timeout", "800ms"},
		{"deadlock_timeout", "1ms"},
		/* with that, each wait would be logged */
		{"log_lock_waits", "off"},
		/* each of these would end the process where an error would do */
		{"exit_on_error", "off"},
		{"transaction_timeout", "0"},
		{"idle_in_transaction_session_timeout", "0"},
		{"idle_session_timeout", "0"},
		/* no worker processes, and no compiler, for short statements */
		{"jit", "off"},
		{"max_parallel_workers_per_gather", "0"},
		/* odd costs and sizes make odd plans, or ones that want all memory */
		{"geqo", "off"},
		{"hash_mem_multiplier", "2"},
		{"seq_page_cost", "1"},
		{"random_page_cost", "4"},
		{"cpu_tuple_cost", "0.01"},
		{"cpu_index_tuple_cost", "0.005"},
		{"cpu_operator_cost", "0.0025"},
	};

	for (int i = 0; i < lengthof(pinned); i++)
	{
		/* not every server has all of them */
		if (GetConfigOption(pinned[i][0], true, false) != NULL)
			SetConfigOption(pinned[i][0], pinned[i][1],
							PGC_SUSET, PGC_S_OVERRIDE);
	}
	SetConfigOption("application_name", MyBgworkerEntry->bgw_name,
					PGC_USERSET, PGC_S_SESSION);
}

/* -------------------------------------------------------------------------
 * After an error
 * -------------------------------------------------------------------------
 */

/*
 * Has the log not yet seen an error of this kind since the last cycle that
 * went through?  Retries meet the same error again and again, and its message
 * may vary from one to the next.
 */
static bool
is_news(const WorkerError *error)
{
	for (int i = 0; i < num_logged_errors; i++)
		if (logged_errors[i] == error->sqlstate)
			return false;
	if (num_logged_errors < MAX_LOGGED_ERRORS)
		logged_errors[num_logged_errors++] = error->sqlstate;
	return true;
}

/*
 * Let go of what the error left behind.
 *
 * Inside a transaction the abort does it all: it puts back the user, the
 * settings and the snapshots, and releases locks and buffers.  Outside of one
 * the abort does nothing, so what may be held there is released by hand.
 */
static void
release_everything(void)
{
	AbortCurrentTransaction();
	LWLockReleaseAll();
	ConditionVariableCancelSleep();
	LockErrorCleanup();
	pgstat_report_wait_end();
	pgaio_error_cleanup();
	UnlockBuffers();
	if (AuxProcessResourceOwner)
		ReleaseAuxProcessResources(false);
	AtEOXact_Buffers(false);
	AtEOXact_SMgr();
	AtEOXact_Files(false);
	AtEOXact_HashTables(false);
}

/*
 * Something raised an error: be as fit as before it, and say what happened.
 */
static void
recover(void)
{
	ErrorData  *edata;
	WorkerError error;
	bool		was_in_share = in_share;

	/* Neither PG_TRY nor an abort does this for us. */
	error_context_stack = NULL;

	/*
	 * The jump has undone all that held interrupts back.  A cancel or SIGTERM
	 * that comes now must wait until we are done; a cancel that has come is
	 * obeyed by now.
	 */
	HOLD_INTERRUPTS();
	disable_all_timeouts(false);
	QueryCancelPending = false;

	MemoryContextSwitchTo(cycle_context);
	edata = CopyErrorData();
	copy_error(&error, edata);

	release_everything();
	MemoryContextSwitchTo(cycle_context);
	release_session_locks();

	/* An error in what follows is none of the share's. */
	in_share = false;

	/*
	 * Whoever told us to stop has caused it, and waits for our exit.  To ask
	 * the job would be to let it take that for an error of its own.
	 */
	if (slot_is_stopping())
		proc_exit(0);

	/* The job may know how to go on.  Then it is no error of the cycle. */
	if (was_in_share && job_failed(&error))
		FlushErrorState();
	else
	{
		if (is_news(&error))
			EmitErrorReport();
		FlushErrorState();

		/* Whoever launched us gets the error, and no worker. */
		if (!ready && slot_has_launcher())
		{
			fatal_error = error;
			proc_exit(1);
		}
		fatal_error.sqlstate = 0;	/* this one we survive */

		/* Between two shares, or in the nap, no cycle fails. */
		if (was_in_share)
			fail_cycle(&error);
		else
			slot_note_error(&error);

		/*
		 * Where nothing can raise.  An error in the nap would bring us here
		 * again at once, and fill the log.
		 */
		pg_usleep(ERROR_PAUSE_US);
	}

	HOLD_CANCEL_INTERRUPTS();	/* as it was before the error */
	RESUME_INTERRUPTS();
}

/* -------------------------------------------------------------------------
 * One cycle
 * -------------------------------------------------------------------------
 */

/* Says in every error which worker it came from, and what it worked on. */
static void
share_error_context(void *arg)
{
	errcontext("%s on table \"%s\"", MyBgworkerEntry->bgw_name, job_name);
}

/*
 * A delay that doubles with each failure in a row, less some jitter, lest
 * workers that failed together try again together.
 */
static int
backoff_ms(int failures)
{
	int			delay = Min(MIN_BACKOFF_MS << Min(failures, 6), MAX_BACKOFF_MS);

	return delay - (int) (delay / 8.0 * pg_prng_double(&pg_global_prng_state));
}

/*
 * Code that runs in a share may take advisory locks that outlast it.  Kept
 * until the end of the cycle, those of a long one would fill the lock table,
 * and nobody else could get a lock.
 */
static void
release_session_locks(void)
{
	LockReleaseSession(USER_LOCKMETHOD);
}

/*
 * Run a share of the job in a transaction of its own.  Returns whether there
 * is more to do.
 */
static bool
run_share(JobProgress *progress)
{
	bool		more;
	ErrorContextCallback errcallback = {
		.previous = error_context_stack,
		.callback = share_error_context
	};

	MemoryContextReset(cycle_context);
	memset(progress, 0, sizeof(*progress));
	progress->may_make = slot_may_make();
	progress->asked = cycle.asked;
	error_context_stack = &errcallback;

	/* now() and pg_stat_activity take the time from here. */
	SetCurrentStatementStartTimestamp();
	StartTransactionCommand();

	/* Without our role we are as good as not connected. */
	connected = SearchSysCacheExists1(AUTHOID, ObjectIdGetDatum(GetUserId()));
	if (!connected)
		ereport(FATAL,
				(errcode(ERRCODE_INVALID_AUTHORIZATION_SPECIFICATION),
				 errmsg("role with OID %u was dropped", GetUserId())));

	/* A cancel that came between two shares was not meant for this one. */
	QueryCancelPending = false;
	RESUME_CANCEL_INTERRUPTS();
	in_share = true;

	if (SPI_connect() != SPI_OK_CONNECT)
		elog(ERROR, "SPI_connect failed");
	more = job_step(progress);
	if (progress->undo)
		AbortCurrentTransaction();
	else
	{
		SPI_finish();
		CommitTransactionCommand();
	}

	/* From here on nothing that is raised has anything to do with the share. */
	in_share = false;
	HOLD_CANCEL_INTERRUPTS();
	MemoryContextSwitchTo(cycle_context);
	error_context_stack = errcallback.previous;
	if (!progress->undo)
	{
		job_committed();
		slot_progress(progress->rows_done, progress->rows_left);
	}
	release_session_locks();
	return more || progress->undo;
}

/*
 * What the job works on is there: whoever launched us can go on, and an error
 * no longer ends us.
 */
static void
become_ready(void)
{
	slot_has_made();
	if (ready)
		return;
	injection_point("worker-spi-not-yet-ready");

	/* Before the log line, which can be interrupted: somebody waits. */
	ready = true;
	slot_ready();
	ereport(LOG,
			(errmsg("%s initialized with %s",
					MyBgworkerEntry->bgw_name, job_name)));
}

/*
 * A series of short transactions, whatever there is to do.  Between two of
 * them, also if the first has failed and another is to follow, nothing of ours
 * is in anybody's way, and everything that a nap obeys is obeyed too: a long
 * cycle must not go on without a postmaster, or with settings of long ago.
 */
static void
run_cycle(void)
{
	JobProgress progress = {0};
	bool		more = true;

	if (!cycle.running)
	{
		/* All that is committed by now, the cycle will see. */
		cycle.start = GetCurrentTimestamp();
		cycle.asked = slot_begin_cycle();
		cycle.running = true;

		/* only counters: begin */
		cycle.sooner = DT_NOEND;
		/* only counters: end */
	}
	while (more)
	{
		CHECK_FOR_INTERRUPTS();
		if (!PostmasterIsAlive())
			proc_exit(1);
		if (slot_is_stopping())
			proc_exit(0);
		reload_settings();
		leave_if_database_is_wanted();

		more = run_share(&progress);
		if (progress.tables_ready && !progress.undo)
			become_ready();
	}
	end_cycle(&progress);
}

/* The cycle went through.  Say so, and when the next is due. */
static void
end_cycle(const JobProgress *progress)
{
	cycle.running = false;
	cycle.end = GetCurrentTimestamp();
	cycle.again_ms = progress->again_ms;
	cycle.failures = 0;
	slot_end_cycle(cycle.start, next_cycle(cycle.end), NULL,
				   &progress->pending_error);
	if (num_logged_errors > 0)
	{
		num_logged_errors = 0;
		ereport(LOG,
				(errmsg("%s has recovered, and works on %s again",
						MyBgworkerEntry->bgw_name, job_name)));
	}
	report_statistics();
}

/*
 * The cycle has failed.  Say so, and when the next is due.
 *
 * What a session takes over only when it starts must not outlive its cause: a
 * read-only default of the database, say, that was reset since.  So after some
 * failures in a row, and then now and then, another process takes our place.
 * Class 42 is the exception, where the user has something to mend; but a
 * privilege may be one of those that a role has since it connected.
 */
static void
fail_cycle(const WorkerError *error)
{
	TimestampTz next;

	cycle.running = false;
	cycle.end = GetCurrentTimestamp();
	cycle.failed_sqlstate = error->sqlstate;
	cycle.delay_ms = backoff_ms(cycle.failures++);
	next = next_cycle(cycle.end);
	slot_end_cycle(cycle.start, next, error, NULL);
	report_statistics();

	if (cycle.failures >= AFRESH_FAILURES &&
		worker_spi_restart_interval <= AFRESH_RESTART_S &&
		(ERRCODE_TO_CATEGORY(error->sqlstate) != ERRCODE_SYNTAX_ERROR_OR_ACCESS_RULE_VIOLATION ||
		 error->sqlstate == ERRCODE_INSUFFICIENT_PRIVILEGE) &&
		slot_start_afresh(cycle.failures, next, AFRESH_MINUTES))
	{
		ereport(LOG,
				(errmsg("%s starts afresh after %d failures",
						MyBgworkerEntry->bgw_name, cycle.failures)));
		proc_exit(1);
	}
}

/* Without this, autovacuum would not see what the cycle has written. */
static void
report_statistics(void)
{
	pgstat_report_activity(STATE_IDLE, NULL);
	pgstat_report_stat(true);
}

/* -------------------------------------------------------------------------
 * The nap
 * -------------------------------------------------------------------------
 */

/*
 * When the next cycle is due.  Computed anew each time: a reload may have
 * changed the naptime, and the clock may have been set back, which must not
 * make the nap longer.
 */
static TimestampTz
next_cycle(TimestampTz now)
{
	int64		naptime = worker_spi_naptime * INT64CONST(1000);
	TimestampTz next;

	if (cycle.end == DT_NOBEGIN)
		return now;				/* the first one */
	cycle.end = Min(cycle.end, now);
	if (cycle.failures > 0)
		next = TimestampTzPlusMilliseconds(cycle.end, cycle.delay_ms);
	else
		next = TimestampTzPlusMilliseconds(cycle.end,
										   cycle.again_ms > 0 ?
										   Min(cycle.again_ms, naptime) : naptime);

	/* only counters: begin */

	/* A lock that was in the way may be gone by then; other causes are not. */
	if (cycle.failures == 0 || cycle.failed_sqlstate == ERRCODE_LOCK_NOT_AVAILABLE)
		next = Min(next, cycle.sooner);
	/* only counters: end */
	return next;
}

/*
 * Sleep until the next cycle is due, or somebody waits for one.
 *
 * An error here does not touch the time of the next cycle, so that the work
 * goes on even if each nap fails.
 */
static void
nap(void)
{
	for (;;)
	{
		TimestampTz now;
		TimestampTz next;
		NapOrder	order;
		long		timeout;

		/*
		 * Not only when the latch has woken us: if the signal came during the
		 * cycle, a wait there, say for a lock, has reset the latch already.
		 */
		reload_settings();

		now = GetCurrentTimestamp();

		/* only counters: begin */

		/*
		 * A commit's delay counts from when we first see its request, but a
		 * clock that is set back must not make it longer.
		 */
		if (slot_woken())
			cycle.sooner = Min(cycle.sooner,
							   TimestampTzPlusMilliseconds(now, worker_spi_wake_delay));
		/* only counters: end */
		next = next_cycle(now);

		order = slot_nap(next);
		if (order == NAP_STOP)
			proc_exit(0);
		if (order == NAP_WORK_NOW || now >= next)
			break;

		timeout = TimestampDifferenceMilliseconds(now, next);
		if (params.is_static || params.interruptible)
			timeout = Min(timeout, DATABASE_PROBE_MS);

		/*
		 * WL_EXIT_ON_PM_DEATH: without it, a worker outlives the postmaster
		 * and keeps a new one from starting.  The latch is reset before the
		 * loop looks at anything that its setter may have changed, so that
		 * nothing is missed.
		 */
		(void) WaitLatch(MyLatch,
						 WL_LATCH_SET | WL_TIMEOUT | WL_EXIT_ON_PM_DEATH,
						 timeout, nap_wait_event);
		ResetLatch(MyLatch);
		CHECK_FOR_INTERRUPTS();
		leave_if_database_is_wanted();
	}
}

/* React to a reload of the configuration, if there was one. */
static void
reload_settings(void)
{
	ListResult	result;

	if (!ConfigReloadPending)
		return;
	ConfigReloadPending = false;
	ProcessConfigFile(PGC_SIGHUP);
	if (!params.is_static)
		return;

	if (strcmp(connected_role, worker_spi_role) != 0)
	{
		ereport(LOG,
				(errmsg("%s reconnects because its role was changed",
						MyBgworkerEntry->bgw_name)));
		proc_exit(1);
	}
	if (strcmp(connected_list, worker_spi_database) == 0)
		return;

	result = slot_follow_list(worker_spi_database);
	if (result == LIST_MOVE)
	{
		ereport(LOG,
				(errmsg("%s moves to database \"%s\"",
						MyBgworkerEntry->bgw_name, slot_database())));
		proc_exit(1);
	}
	if (result == LIST_LEAVE)
	{
		ereport(LOG,
				(errmsg("%s stops because its database is no longer listed",
						MyBgworkerEntry->bgw_name)));
		proc_exit(0);
	}
	pfree(connected_list);
	connected_list = MemoryContextStrdup(TopMemoryContext,
										 worker_spi_database);
}

/* -------------------------------------------------------------------------
 * Giving way
 * -------------------------------------------------------------------------
 */

/* Is one of these transactions also among those? */
static bool
have_common(const VirtualTransactionId *these, const VirtualTransactionId *those)
{
	for (; VirtualTransactionIdIsValid(*these); these++)
		for (const VirtualTransactionId *t = those;
			 VirtualTransactionIdIsValid(*t); t++)
			if (VirtualTransactionIdEquals(*these, *t))
				return true;
	return false;
}

/*
 * Wait for our turn at a lock, but not for long.  Returns false if it did not
 * come.  Called in a transaction, which is good for nothing but to be aborted
 * afterwards.  A cancel ends the wait, and proves nothing.
 */
static bool
wait_for_turn(const LOCKTAG *tag)
{
	MemoryContext caller_context = CurrentMemoryContext;
	volatile bool in_turn = true;

	(void) set_config_option("lock_timeout", CppAsString2(DATABASE_WAIT_MS),
							 PGC_SUSET, PGC_S_OVERRIDE, GUC_ACTION_LOCAL,
							 true, 0, false);
	PG_TRY();
	{
		/* The server has a timeout strike in the same way as a cancel. */
		RESUME_CANCEL_INTERRUPTS();
		(void) LockAcquire(tag, RowExclusiveLock, false, false);
		HOLD_CANCEL_INTERRUPTS();
	}
	PG_CATCH();
	{
		HOLD_CANCEL_INTERRUPTS();	/* as it was before the error */
		in_turn = geterrcode() == ERRCODE_QUERY_CANCELED;
		if (!in_turn && geterrcode() != ERRCODE_LOCK_NOT_AVAILABLE)
			PG_RE_THROW();
		LockErrorCleanup();		/* out of the queue */
		MemoryContextSwitchTo(caller_context);
		FlushErrorState();
	}
	PG_END_TRY();
	return in_turn;
}

/*
 * Is the lock on our database to be had that a new connection takes?  A
 * session-level lock needs no transaction, so this costs next to nothing.
 */
static bool
database_is_free(void)
{
	LOCKTAG		tag;

	SET_LOCKTAG_OBJECT(tag, InvalidOid, DatabaseRelationId, MyDatabaseId, 0);
	if (LockAcquire(&tag, RowExclusiveLock, true, true) == LOCKACQUIRE_NOT_AVAIL)
		return false;
	LockRelease(&tag, RowExclusiveLock, true);
	return true;
}

/*
 * Does somebody need the database to itself?
 *
 * DROP DATABASE, RENAME, SET TABLESPACE and CREATE DATABASE ... TEMPLATE lock
 * the database against new connections, and then give those that are there
 * five seconds to go away.  But the lock is taken before the server knows
 * whether the command is allowed, so anybody may hold it for a moment, even
 * again and again.  So we queue up for the lock that a new connection takes:
 * if its holder lets go of it, it is our turn before it is the holder's again.
 * If our turn does not come, and a transaction that held the lock when we
 * queued up holds it still, that one is a command that wants the database.
 */
static bool
database_is_wanted(void)
{
	LOCKTAG		tag;
	const VirtualTransactionId *holders;
	bool		wanted;

	if (database_is_free())
		return false;			/* most of the time */

	SET_LOCKTAG_OBJECT(tag, InvalidOid, DatabaseRelationId, MyDatabaseId, 0);
	StartTransactionCommand();
	QueryCancelPending = false;

	/* The lists live in the transaction: a nap may meet many such moments. */
	holders = GetLockConflicts(&tag, RowExclusiveLock, NULL);
	wanted = !wait_for_turn(&tag) &&
		have_common(holders, GetLockConflicts(&tag, RowExclusiveLock, NULL));
	AbortCurrentTransaction();
	MemoryContextSwitchTo(cycle_context);
	slot_keep();
	return wanted;
}

/*
 * Leave, if we are one that does and somebody wants our database.  A static
 * worker is started again after its restart interval, and then waits in the
 * connection for the command to end.  From 19 on, the server itself ends and
 * forgets the interruptible ones.
 */
static void
leave_if_database_is_wanted(void)
{
	TimestampTz now = GetCurrentTimestamp();

	if (!params.is_static &&
		(!params.interruptible || SERVER_INTERRUPTS_WORKERS))
		return;

	/* Not each time that we are woken; and the clock may be set back. */
	if (now < next_probe &&
		next_probe - now <= DATABASE_PROBE_MS * INT64CONST(1000))
		return;
	next_probe = TimestampTzPlusMilliseconds(now, DATABASE_PROBE_MS / 2);

	MemoryContextSwitchTo(cycle_context);
	if (database_is_wanted())
	{
		ereport(LOG,
				(errmsg("%s gives way to a command on its database",
						MyBgworkerEntry->bgw_name)));
		proc_exit(params.is_static ? 1 : 0);
	}
}

/* -------------------------------------------------------------------------
 * Exit
 * -------------------------------------------------------------------------
 */

/*
 * Leave the slot.  It runs after the abort of the current transaction, if
 * there is one, since it was registered before that of the connection.
 *
 * Only with exit code 0 does the postmaster forget a worker.
 */
static void
exit_callback(int code, Datum arg)
{
	bool		for_good = code == 0;

	/*
	 * A dynamic worker whose database or role is gone, or whose role may no
	 * longer log in, would fail in the same way each time it is started. Once
	 * connected, such an error is not about the connection.
	 */
	if (!params.is_static && !connected &&
		(fatal_error.sqlstate == ERRCODE_UNDEFINED_DATABASE ||
		 fatal_error.sqlstate == ERRCODE_INVALID_AUTHORIZATION_SPECIFICATION))
		for_good = true;

	for_good = slot_detach(for_good, &fatal_error);
	injection_point("worker-spi-detached");

	/*
	 * Did the server terminate us because somebody needs the database?  Then
	 * it forgets us, whatever our exit code, and so must the slot.  Asked
	 * last: an error would end this callback, but no longer harm the slot.
	 */
	if (!for_good && params.interruptible && SERVER_INTERRUPTS_WORKERS &&
		OidIsValid(MyDatabaseId) && !database_is_free())
		slot_forget(&params);

	/* A callback may exit again; the callbacks that are left still run. */
	if (for_good && code != 0)
		proc_exit(0);
}

/* Hook of the server log: keep the error that ends this process. */
static void
remember_fatal_error(ErrorData *edata)
{
	if (edata->elevel >= ERROR)
		copy_error(&fatal_error, edata);
	if (prev_emit_log_hook)
		prev_emit_log_hook(edata);
}
