/* -------------------------------------------------------------------------
 *
 * worker.c
 *		The background worker process: start, loop, nap, exit, and the fold.
 *
 * The comment at the top of worker_spi.c says how it all hangs together.
 *
 * Copyright (c) 2026, worker_spi contributors
 *
 * -------------------------------------------------------------------------
 */

#include "postgres.h"

#include "access/genam.h"
#include "access/htup_details.h"
#include "access/relation.h"
#include "access/xact.h"
#include "catalog/namespace.h"
#include "catalog/pg_authid.h"
#include "catalog/pg_collation.h"
#include "catalog/pg_database.h"
#include "catalog/pg_namespace.h"
#include "catalog/pg_operator.h"
#include "catalog/pg_type.h"
#include "commands/async.h"
#include "common/pg_prng.h"
#include "executor/spi.h"
#include "mb/pg_wchar.h"
#include "miscadmin.h"
#include "nodes/makefuncs.h"
#include "nodes/nodeFuncs.h"
#include "parser/parse_param.h"
#include "pgstat.h"
#include "postmaster/interrupt.h"
#include "storage/bufmgr.h"
#include "storage/ipc.h"
#include "storage/pmsignal.h"
#include "tcop/tcopprot.h"
#include "utils/builtins.h"
#include "utils/guc.h"
#include "utils/inval.h"
#include "utils/memutils.h"
#include "utils/rel.h"
#include "utils/snapmgr.h"
#include "utils/syscache.h"
#include "worker_spi.h"

/* -------------------------------------------------------------------------
 * Types, and what the process keeps for itself
 * -------------------------------------------------------------------------
 */

#define DATABASE_PROBE_MS	500 /* how often a nap looks for DROP DATABASE */

/*
 * How many blocks one transaction folds.  Without keys, 500 blocks (some
 * 90,000 deltas) take about 40 ms, and a million deltas take as long in
 * ranges of that size as in one piece.  With keys, each range updates the
 * total of each key that it meets, so the ranges must be few.
 */
#define BLOCKS_PER_FOLD		500
#define BLOCKS_PER_FOLD_WITH_KEYS	8000

#define MAX_IMMEDIATE_RETRIES 10	/* after serialization failures */
#define MIN_BACKOFF_MS		1000
#define MAX_BACKOFF_MS		60000

/* The statements of a fold; each is a saved plan with two parameters. */
typedef enum FoldStatement
{
	FOLD_PROBE,					/* find the first delta from block $1 on */
	FOLD_ADD,					/* add the deltas in [$1, $2) to the totals */
	FOLD_DELETE,				/* delete the deltas in [$1, $2) */
	NUM_FOLD_STATEMENTS
} FoldStatement;

/* What a worker knows about its table, as long as the relcache agrees. */
typedef struct FoldTable
{
	bool		valid;			/* cleared by the invalidation callback */
	Oid			relid;
	bool		has_keys;		/* more columns than type and value? */
	MemoryContext context;		/* holds sql */
	char	   *sql[NUM_FOLD_STATEMENTS];
	SPIPlanPtr	plan[NUM_FOLD_STATEMENTS];
} FoldTable;

/* What to put back when the worker stops acting as somebody else. */
typedef struct SavedIdentity
{
	Oid			userid;
	int			sec_context;
	int			guc_nestlevel;
} SavedIdentity;

/* How a cycle ended. */
typedef enum CycleOutcome
{
	CYCLE_OK,
	CYCLE_RETRY,				/* lost against another transaction */
	CYCLE_FAILED
} CycleOutcome;

/* What a cycle did in the transactions that it has committed. */
typedef struct CycleResult
{
	int64		rows;			/* deltas folded */
	int64		totals;			/* total rows changed */
	int64		total;			/* the last total, for a table without keys */
	bool		unnotified;		/* has a total changed since the last NOTIFY? */
} CycleResult;

static emit_log_hook_type prev_emit_log_hook = NULL;

/* In a worker: who it is. */
static WorkerParams Me;
WorkerSlot *MySlot = NULL;
static WorkerSlot private_slot; /* MySlot's target without shared memory */
static bool leaving_for_good = false;	/* exit code 0 whatever happens? */
static bool ready = false;		/* has this process adopted its table? */
static uint32 nap_wait_event;

/* In a static worker: the settings it connected with. */
static char *connected_database;
static char *connected_role;

/* In a worker: its table, and the error it logged last. */
static char my_schema[NAMEDATALEN];
static char my_table[2 * NAMEDATALEN];	/* for messages and notifications */
static FoldTable Table;
static CycleResult Cycle;		/* lasts over retries of the cycle */
static WorkerError logged_error;

/* In a worker: the error it is about to die of. */
static WorkerError fatal_error;

/* In a worker: the fold requests that the current or last cycle serves. */
static uint64 serving = 0;

static void attach_slot(int slotno);
static void detach_slot(int code, Datum arg);
static bool database_is_wanted(void);
static void nap(TimestampTz cycle_end, int backoff_ms);
static CycleOutcome run_cycle(bool may_retry);
static void fold(void);

/* -------------------------------------------------------------------------
 * The worker: start, loop, nap, exit
 * -------------------------------------------------------------------------
 */

/* Copy as much as there is room for, cut between characters; NULL is "". */
static void
copy_text(char *target, const char *source)
{
	int			len = source ? strlen(source) : 0;

	len = pg_mbcliplen(source, len, ERROR_TEXT_SIZE - 1);
	memcpy(target, source ? source : "", len);
	target[len] = '\0';
}

/* Keep of an error what other processes may want to know. */
static void
copy_error_data(WorkerError *error, const ErrorData *edata)
{
	error->sqlstate = edata->sqlerrcode;
	copy_text(error->message, edata->message);
	copy_text(error->detail, edata->detail);
	copy_text(error->hint, edata->hint);
}

/*
 * Remember the error that ends this process, for whoever waits for it.
 *
 * A FATAL error runs no PG_CATCH block, so this is the only place where its
 * text can be had.
 */
static void
remember_fatal_error(ErrorData *edata)
{
	if (edata->elevel >= ERROR)
		copy_error_data(&fatal_error, edata);
	if (prev_emit_log_hook)
		prev_emit_log_hook(edata);
}

/*
 * Connect to the database.  This can be done once in the life of a process:
 * a worker that is to move must exit and be started again.
 */
static void
connect_to_database(void)
{
	if (Me.is_static)
	{
		connected_database = MemoryContextStrdup(TopMemoryContext,
												 worker_spi_database);
		connected_role = MemoryContextStrdup(TopMemoryContext,
											 worker_spi_role);
		BackgroundWorkerInitializeConnection(connected_database,
											 connected_role[0] ? connected_role : NULL,
											 0);
	}
	else
	{
		/* The bootstrap superuser may always log in; by OID it may not. */
		BackgroundWorkerInitializeConnectionByOid(Me.dboid,
												  Me.roleoid == BOOTSTRAP_SUPERUSERID ? InvalidOid : Me.roleoid,
												  Me.connflags);
	}

	/*
	 * The owner of a database may ALTER DATABASE ... SET role, and so choose
	 * whom the worker connects as.  Choose again.
	 */
	StartTransactionCommand();
	SetConfigOption("session_authorization",
					GetUserNameFromId(GetAuthenticatedUserId(), false),
					PGC_SUSET, PGC_S_OVERRIDE);
	SetConfigOption("role", "none", PGC_SUSET, PGC_S_OVERRIDE);
	CommitTransactionCommand();
}

/*
 * Pin the settings that folding relies on.  PGC_S_OVERRIDE keeps a reload, and
 * ALTER ROLE or ALTER DATABASE ... SET, from changing them again.
 */
static void
pin_settings(void)
{
	static const char *const pinned[][2] = {
		/* a name in a statement or trigger means what it says */
		{"search_path", "pg_catalog, pg_temp"},
		/* a hidden delta would be lost: fail instead of hiding it */
		{"row_security", "off"},
		/* all statements of one fold see the same deltas */
		{"default_transaction_isolation", "repeatable read"},
		/* after a crash the fold was made or it was not; both are right */
		{"synchronous_commit", "off"},
		/* longer than deadlock_timeout's default, short of a hang */
		{"lock_timeout", "2s"},
		/* it would end the process, not the cycle; new in 17 */
		{"transaction_timeout", "0"},
		/* neither pays for itself in statements as short as these */
		{"jit", "off"},
		{"max_parallel_workers_per_gather", "0"},
		/* always the range scan over ctid, in physical order */
		{"enable_tidscan", "on"},
		{"enable_seqscan", "off"},
		{"enable_indexscan", "off"},
		{"enable_bitmapscan", "off"},
	};

	for (int i = 0; i < lengthof(pinned); i++)
	{
		if (GetConfigOption(pinned[i][0], true, false) != NULL)
			SetConfigOption(pinned[i][0], pinned[i][1],
							PGC_SUSET, PGC_S_OVERRIDE);
	}
	SetConfigOption("application_name", MyBgworkerEntry->bgw_name,
					PGC_USERSET, PGC_S_SESSION);
}

/* The relcache forgot something; if it was our table, look at it anew. */
static void
invalidate_table(Datum arg, Oid relid)
{
	if (relid == Table.relid || !OidIsValid(relid))
		Table.valid = false;
}

/*
 * Be the only worker of our index in this database, for as long as we live.
 */
static void
claim_index(void)
{
	if (Shared)
	{
		/*
		 * Now the slot can name the database.  A static worker that has just
		 * moved may find a dynamic one of its number there.
		 */
		bool		duplicate = false;

		LWLockAcquire(Shared->lock, LW_EXCLUSIVE);
		for (int i = 0; i < Shared->nslots; i++)
		{
			WorkerSlot *other = &Shared->slots[i];

			if (other != MySlot && other->generation != 0 &&
				other->params.index == Me.index &&
				other->dboid == MyDatabaseId)
				duplicate = true;
		}
		if (!duplicate)
		{
			MySlot->dboid = MyDatabaseId;
			MySlot->roleoid = GetUserId();
		}
		LWLockRelease(Shared->lock);

		if (duplicate)
			ereport(FATAL,
					(errcode(ERRCODE_DUPLICATE_OBJECT),
					 errmsg("a worker with index %d already runs in this database",
							Me.index)));
	}
	else
	{
		LOCKTAG		tag;

		/*
		 * Without shared memory, a lock held for life stands for the worker.
		 * The launcher holds it until it sees us queue up here.
		 */
		SET_LOCKTAG_WORKER(tag, MyDatabaseId, Me.index);
		StartTransactionCommand();
		(void) LockAcquire(&tag, ExclusiveLock, true, false);
		CommitTransactionCommand();
	}
}

/*
 * Entry point of every worker; main_arg is the number of its slot.
 *
 * It must not be static and needs PGDLLEXPORT: the postmaster's child looks it
 * up by name.
 */
void
worker_spi_main(Datum main_arg)
{
	MemoryContext cycle_context;
	int			failures = 0;
	int			retries = 0;

	memcpy(&Me, MyBgworkerEntry->bgw_extra, sizeof(Me));
	snprintf(my_schema, sizeof(my_schema), "schema%d", Me.index);
	snprintf(my_table, sizeof(my_table), "%s.counted", my_schema);

	/*
	 * Signals are blocked until now, so that none is lost before there is a
	 * handler for it.  The default for SIGTERM does not respect critical
	 * sections; die() sets a flag that CHECK_FOR_INTERRUPTS() acts upon, and
	 * so ends a running statement as well.  SIGHUP would be ignored.
	 */
	pqsignal(SIGHUP, SignalHandlerForConfigReload);
	pqsignal(SIGTERM, die);

	/* What is not for the log does not get to its hook either. */
	if (log_min_messages > FATAL)
		SetConfigOption("log_min_messages", "fatal",
						PGC_SUSET, PGC_S_OVERRIDE);
	prev_emit_log_hook = emit_log_hook;
	emit_log_hook = remember_fatal_error;

	attach_slot(DatumGetInt32(main_arg));
	BackgroundWorkerUnblockSignals();

	connect_to_database();
	pin_settings();
	nap_wait_event = define_wait_event("WorkerSpiMain");
	CacheRegisterRelcacheCallback(invalidate_table, (Datum) 0);

	claim_index();

	/*
	 * A commit leaves us in TopMemoryContext, where whatever is allocated
	 * stays for the life of the process.
	 */
	cycle_context = AllocSetContextCreate(TopMemoryContext,
										  "worker_spi cycle",
										  ALLOCSET_DEFAULT_SIZES);
	Table.context = AllocSetContextCreate(TopMemoryContext,
										  "worker_spi statements",
										  ALLOCSET_DEFAULT_SIZES);

	for (;;)
	{
		int			backoff_ms = 0;

		MemoryContextReset(cycle_context);
		MemoryContextSwitchTo(cycle_context);

		switch (run_cycle(retries < MAX_IMMEDIATE_RETRIES))
		{
			case CYCLE_OK:
				failures = retries = 0;
				break;

			case CYCLE_RETRY:
				retries++;
				continue;		/* somebody else won; by now it is our turn */

			case CYCLE_FAILED:
				/* Whoever launched us gets the error, and no worker. */
				if (!ready && MySlot->launcher)
					proc_exit(1);

				/*
				 * Double the delay each time, less some jitter, lest workers
				 * that failed together try again together.
				 */
				backoff_ms = Min(MIN_BACKOFF_MS << Min(failures, 6),
								 MAX_BACKOFF_MS);
				backoff_ms -= (int) (backoff_ms / 8.0 *
									 pg_prng_double(&pg_global_prng_state));
				failures++;
				retries = 0;
				break;
		}

		nap(GetCurrentTimestamp(), backoff_ms);
	}
}

/*
 * Take over the slot of our registration, if it still is ours.
 *
 * Signals are still blocked and nothing here can fail, so the exit callback
 * stands before there is anything that could need it, and never cleans up
 * after a process that was not us.
 */
static void
attach_slot(int slotno)
{
	bool		mine = true;

	if (Shared)
	{
		MySlot = &Shared->slots[slotno];

		LWLockAcquire(Shared->lock, LW_EXCLUSIVE);
		if (MySlot->generation == Me.generation && !MySlot->stop)
		{
			Assert(MySlot->pid == 0);
			MySlot->pid = MyProcPid;
			MySlot->latch = MyLatch;
			MySlot->state = WORKER_STARTING;
			MySlot->starts++;
			MySlot->worker_start = GetCurrentTimestamp();
		}
		else
			mine = false;
		LWLockRelease(Shared->lock);
	}
	else
	{
		MySlot = &private_slot;
		pg_atomic_init_u32(&MySlot->wake, 0);
		ConditionVariableInit(&MySlot->changed);
		MySlot->launcher = MyLatch;
	}

	/* Stopped while there was no process: leave, and be forgotten. */
	if (!mine)
		proc_exit(0);

	before_shmem_exit(detach_slot, (Datum) 0);
}

/* The lock on the slots; a private slot needs none. */
static void
lock_slots(LWLockMode mode)
{
	if (Shared)
		LWLockAcquire(Shared->lock, mode);
}

static void
unlock_slots(void)
{
	if (Shared)
		LWLockRelease(Shared->lock);
}

/* Note an error in our slot.  The caller holds the lock. */
static void
note_error(const WorkerError *error)
{
	MySlot->failed_count++;
	MySlot->last_failed_time = GetCurrentTimestamp();
	MySlot->last_error = *error;
}

/*
 * Exit callback of a worker: leave the slot to the next process, or free it.
 *
 * It runs after the abort of the current transaction, if there is one, since
 * it was registered before that of the connection.
 */
static void
detach_slot(int code, Datum arg)
{
	lock_slots(LW_EXCLUSIVE);
	if (fatal_error.sqlstate != 0)
		note_error(&fatal_error);

	/*
	 * A dynamic worker whose database or role is gone, or whose role may no
	 * longer log in, would fail in the same way each time it is started.
	 */
	if (!Me.is_static &&
		(fatal_error.sqlstate == ERRCODE_UNDEFINED_DATABASE ||
		 fatal_error.sqlstate == ERRCODE_INVALID_AUTHORIZATION_SPECIFICATION))
		leaving_for_good = true;
	if (MySlot->stop || MySlot->launcher)
		leaving_for_good = true;

	MySlot->pid = 0;
	MySlot->latch = NULL;
	MySlot->state = WORKER_STARTING;
	MySlot->next_fold_time = 0;
	if (Me.is_static)
		MySlot->dboid = MySlot->roleoid = InvalidOid;
	if (MySlot->launcher)
		SetLatch(MySlot->launcher); /* it reads the error, then frees */
	else if (leaving_for_good)
		free_slot(MySlot);
	unlock_slots();
	ConditionVariableBroadcast(&MySlot->changed);

	/*
	 * Terminated for a command that needs the database?  A server with
	 * BGWORKER_INTERRUPTIBLE does that, and forgets the worker.  Asked last,
	 * since an error now would end this callback, but no longer harm the
	 * slot.
	 */
	if (!leaving_for_good && Me.interruptible && OidIsValid(MyDatabaseId) &&
		database_is_wanted())
	{
		leaving_for_good = true;
		lock_slots(LW_EXCLUSIVE);
		if (MySlot->generation == Me.generation)
			free_slot(MySlot);
		unlock_slots();
	}

	/*
	 * Only with exit code 0 does the postmaster forget a worker.  A callback
	 * may call proc_exit() again; the callbacks that are left still run.
	 */
	if (leaving_for_good && code != 0)
		proc_exit(0);
}

/*
 * Does somebody need the database to himself?
 *
 * DROP DATABASE, RENAME, SET TABLESPACE and CREATE DATABASE ... TEMPLATE lock
 * the database against new connections, and then give those that are there
 * five seconds to go away.  If the lock that a new connection takes is not to
 * be had at once, that is what is going on.  A session-level lock needs no
 * transaction, so the probe costs next to nothing.
 */
static bool
database_is_wanted(void)
{
	LOCKTAG		tag;

	SET_LOCKTAG_OBJECT(tag, InvalidOid, DatabaseRelationId, MyDatabaseId, 0);
	if (LockAcquire(&tag, RowExclusiveLock, true, true) ==
		LOCKACQUIRE_NOT_AVAIL)
		return true;
	LockRelease(&tag, RowExclusiveLock, true);
	return false;
}

/* Are we one that leaves its database to such a command? */
static bool
gives_way(void)
{
	return Me.is_static || Me.interruptible;
}

/*
 * Leave.  A static worker is started again after its restart interval, and
 * then waits in the connection for the command to end.
 */
static void
give_way(void)
{
	ereport(LOG,
			(errmsg("%s gives way to a command on its database",
					MyBgworkerEntry->bgw_name),
			 errhidecontext(true)));

	leaving_for_good = Me.interruptible;
	proc_exit(Me.interruptible ? 0 : 1);
}

/* React to a reload of the configuration. */
static void
reload_settings(void)
{
	ConfigReloadPending = false;
	ProcessConfigFile(PGC_SIGHUP);

	if (Me.is_static &&
		(strcmp(connected_database, worker_spi_database) != 0 ||
		 strcmp(connected_role, worker_spi_role) != 0))
	{
		ereport(LOG,
				(errmsg("%s reconnects because its database or role was changed",
						MyBgworkerEntry->bgw_name)));
		proc_exit(1);
	}
}

/*
 * Sleep until the next cycle is due: naptime or backoff_ms after cycle_end,
 * wake_delay after a commit asked for it, or at once for worker_spi_fold().
 * backoff_ms is 0 if the last cycle went well.
 */
static void
nap(TimestampTz cycle_end, int backoff_ms)
{
	TimestampTz wake_time = DT_NOEND;
	bool		first = true;

	/*
	 * A cancel request must end a cycle, not the worker: between cycles there
	 * is nothing to catch the error.
	 */
	HOLD_CANCEL_INTERRUPTS();

	for (;;)
	{
		TimestampTz now = GetCurrentTimestamp();
		TimestampTz next;
		bool		fold_now;
		long		timeout;

		/* Computed anew each time, since a reload may change the naptime. */
		next = TimestampTzPlusMilliseconds(cycle_end,
										   backoff_ms ? backoff_ms :
										   worker_spi_naptime * 1000);
		if (!backoff_ms && pg_atomic_read_u32(&MySlot->wake) != 0)
		{
			/* The delay counts from when we first see the request. */
			if (wake_time == DT_NOEND)
				wake_time = TimestampTzPlusMilliseconds(now, worker_spi_wake_delay);
			next = Min(next, wake_time);
		}

		lock_slots(LW_EXCLUSIVE);
		if (MySlot->stop)
		{
			/* Those who wait for a fold learn it from the exit callback. */
			unlock_slots();
			leaving_for_good = true;
			proc_exit(0);
		}
		MySlot->state = backoff_ms ? WORKER_BACKOFF : WORKER_IDLE;
		MySlot->next_fold_time = next;
		MySlot->fold_done = serving;
		if (!backoff_ms)
			MySlot->fold_ok = serving;
		fold_now = MySlot->fold_requested > MySlot->fold_done;
		unlock_slots();

		/* Only now: those who waited for the cycle find its end in the slot. */
		if (first)
			ConditionVariableBroadcast(&MySlot->changed);
		first = false;

		if (fold_now || now >= next)
			break;

		timeout = TimestampDifferenceMilliseconds(now, next);
		if (gives_way())
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

		if (ConfigReloadPending)
			reload_settings();
		if (gives_way() && database_is_wanted())
			give_way();
	}

	QueryCancelPending = false;
	RESUME_CANCEL_INTERRUPTS();
}

/* -------------------------------------------------------------------------
 * One cycle
 * -------------------------------------------------------------------------
 */

/* Says in every error which worker and which table it came from. */
static void
cycle_error_context(void *arg)
{
	errcontext("%s on table \"%s\"", MyBgworkerEntry->bgw_name, my_table);
}

/*
 * Report the error that ended a cycle if it is news: once when it appears, not
 * each time it is met again, and not at all if it is our own way of being told
 * to stop.
 */
static void
report_error(const WorkerError *error)
{
	if (MySlot->stop ||
		(error->sqlstate == logged_error.sqlstate &&
		 strcmp(error->message, logged_error.message) == 0))
		return;

	EmitErrorReport();
	logged_error = *error;
	fatal_error.sqlstate = 0;	/* this one we survive */
}

/*
 * Adopt the table if this process has not yet, and fold what it has.
 *
 * Whatever goes wrong, the transaction is rolled back and the worker is as fit
 * as before.  If it lost against another transaction, and may_retry, that is
 * all; otherwise the error is reported and noted, and those who wait for the
 * cycle get it.
 */
static CycleOutcome
run_cycle(bool may_retry)
{
	MemoryContext caller_context = CurrentMemoryContext;
	TimestampTz start = GetCurrentTimestamp();
	ErrorContextCallback errcallback;
	volatile CycleOutcome outcome = CYCLE_OK;

	lock_slots(LW_EXCLUSIVE);
	MySlot->state = ready ? WORKER_FOLDING : WORKER_STARTING;
	serving = MySlot->fold_requested;
	unlock_slots();

	/* Cleared before any snapshot is taken, so no commit is missed. */
	(void) pg_atomic_exchange_u32(&MySlot->wake, 0);

	errcallback.callback = cycle_error_context;
	errcallback.arg = NULL;
	errcallback.previous = error_context_stack;
	error_context_stack = &errcallback;

	PG_TRY();
	{
		fold();
	}
	PG_CATCH();
	{
		ErrorData  *edata;
		WorkerError error;

		/* A cancel or SIGTERM that comes now must wait until we are done. */
		HOLD_INTERRUPTS();

		MemoryContextSwitchTo(caller_context);
		edata = CopyErrorData();
		copy_error_data(&error, edata);
		FreeErrorData(edata);
		if (may_retry &&
			(error.sqlstate == ERRCODE_T_R_SERIALIZATION_FAILURE ||
			 error.sqlstate == ERRCODE_T_R_DEADLOCK_DETECTED))
			outcome = CYCLE_RETRY;
		else
		{
			outcome = CYCLE_FAILED;
			report_error(&error);
		}

		/*
		 * Rolls back, and puts back the user, the settings, the snapshots,
		 * the locks and SPI.
		 */
		AbortCurrentTransaction();
		FlushErrorState();

		/* Not before: until then, what has failed may hold other locks. */
		if (outcome == CYCLE_FAILED)
		{
			lock_slots(LW_EXCLUSIVE);
			note_error(&error);
			unlock_slots();
		}

		RESUME_INTERRUPTS();
	}
	PG_END_TRY();

	error_context_stack = errcallback.previous;
	MemoryContextSwitchTo(caller_context);
	pgstat_report_activity(STATE_IDLE, NULL);

	/* Without this, autovacuum would not see what the cycle has written. */
	pgstat_report_stat(true);

	if (outcome == CYCLE_RETRY)
		return outcome;

	if (outcome == CYCLE_OK && logged_error.sqlstate != 0)
	{
		ereport(LOG,
				(errmsg("%s folds %s again", MyBgworkerEntry->bgw_name,
						my_table)));
		logged_error.sqlstate = 0;
	}
	if (Cycle.rows == 0)
		return outcome;

	/* Even if it failed, what it had committed until then is folded. */
	if (worker_spi_log_folds)
	{
		if (Table.has_keys)
			ereport(LOG,
					(errmsg("%s: folded " INT64_FORMAT " rows into " INT64_FORMAT " totals of %s",
							MyBgworkerEntry->bgw_name, Cycle.rows,
							Cycle.totals, my_table)));
		else
			ereport(LOG,
					(errmsg("%s: count in %s is now " INT64_FORMAT,
							MyBgworkerEntry->bgw_name, my_table,
							Cycle.total)));
	}
	Cycle.rows = Cycle.totals = 0;

	lock_slots(LW_EXCLUSIVE);
	MySlot->fold_count++;
	MySlot->last_fold_time = GetCurrentTimestamp();
	MySlot->last_fold_ms = (MySlot->last_fold_time - start) / 1000.0;
	unlock_slots();

	return outcome;
}

/*
 * Act as another role, with none of our own privileges, as VACUUM does for an
 * index expression: whatever code the table's owner has attached to it runs
 * with his rights, cannot change role, and leaves no setting changed behind.
 *
 * Only a worker whose role could SET ROLE to the owner may do so.
 */
static void
act_as(Oid owner, SavedIdentity *saved)
{
	GetUserIdAndSecContext(&saved->userid, &saved->sec_context);
	if (!can_act_as(saved->userid, owner))
		ereport(ERROR,
				(errcode(ERRCODE_INSUFFICIENT_PRIVILEGE),
				 errmsg("role \"%s\" cannot act as \"%s\", who owns \"%s\"",
						role_name(saved->userid), role_name(owner),
						my_table)));
	SetUserIdAndSecContext(owner,
						   saved->sec_context | SECURITY_RESTRICTED_OPERATION);
	saved->guc_nestlevel = NewGUCNestLevel();
}

static void
act_as_self(const SavedIdentity *saved)
{
	AtEOXact_GUC(false, saved->guc_nestlevel);
	SetUserIdAndSecContext(saved->userid, saved->sec_context);
}

/* Run a utility command through SPI, and show it in pg_stat_activity. */
static void
run_command(const char *sql)
{
	int			rc;

	pgstat_report_activity(STATE_RUNNING, sql);
	PushActiveSnapshot(GetTransactionSnapshot());
	rc = SPI_execute(sql, false, 0);
	if (rc != SPI_OK_UTILITY)
		elog(ERROR, "SPI_execute failed: %s", SPI_result_code_string(rc));
	PopActiveSnapshot();
}

/*
 * The command that makes the unique index that holds the totals apart: on the
 * key columns, or on type if key_columns is NULL.  It makes ON CONFLICT
 * possible, and two total rows for one counter impossible.
 */
static char *
create_index_command(const char *key_columns)
{
	return psprintf("CREATE UNIQUE INDEX ON %s (%s)%s"
					" WHERE type OPERATOR(pg_catalog.=) 'total'::pg_catalog.text",
					my_table,
					key_columns ? key_columns : "type",
					key_columns ? " NULLS NOT DISTINCT" : "");
}

/*
 * Make the schema, as ourselves, and the table, as the schema's owner, if they
 * are missing.
 *
 * The table is a queue: as many rows die as are inserted.  With the defaults
 * of autovacuum it would grow with each burst, and with each fifth of it that
 * is not yet dead.  Measured over 60 cycles of 100,000 deltas, its size stays
 * on a plateau, but for vacuums that try to truncate it: they wait seconds for
 * a lock that writers do not let them have.
 */
static void
make_table(void)
{
	SavedIdentity saved;
	Oid			nspoid = get_namespace_oid(my_schema, true);
	HeapTuple	tuple;
	Oid			owner;

	if (!OidIsValid(nspoid))
	{
		run_command(psprintf("CREATE SCHEMA %s", my_schema));
		CommandCounterIncrement();
		nspoid = get_namespace_oid(my_schema, false);
	}

	tuple = SearchSysCache1(NAMESPACEOID, ObjectIdGetDatum(nspoid));
	if (!HeapTupleIsValid(tuple))
		ereport(ERROR,
				(errcode(ERRCODE_UNDEFINED_SCHEMA),
				 errmsg("schema \"%s\" was dropped concurrently", my_schema)));
	owner = ((Form_pg_namespace) GETSTRUCT(tuple))->nspowner;
	ReleaseSysCache(tuple);

	act_as(owner, &saved);
	run_command(psprintf("CREATE TABLE %s ("
						 "type pg_catalog.text NOT NULL"
						 " CHECK (type OPERATOR(pg_catalog.=) ANY"
						 " (ARRAY['total'::pg_catalog.text, 'delta'::pg_catalog.text])),"
						 " value pg_catalog.int8 NOT NULL)"
						 " WITH (autovacuum_vacuum_scale_factor = 0,"
						 " autovacuum_vacuum_threshold = 10000,"
						 " autovacuum_vacuum_cost_delay = 0,"
						 " vacuum_truncate = off)",
						 my_table));
	run_command(create_index_command(NULL));
	act_as_self(&saved);
}

/* Refuse what cannot be folded.  The lock on rel keeps it as it is. */
static void
check_kind(Relation rel)
{
	if (rel->rd_rel->relkind != RELKIND_RELATION)
		ereport(ERROR,
				(errcode(ERRCODE_WRONG_OBJECT_TYPE),
				 errmsg("\"%s\" is not an ordinary table", my_table),
				 errdetail_relkind_not_supported(rel->rd_rel->relkind)));

	/* ON DELETE DO INSTEAD NOTHING would count the same deltas for ever. */
	if (rel->rd_rules)
		ereport(ERROR,
				(errcode(ERRCODE_WRONG_OBJECT_TYPE),
				 errmsg("table \"%s\" has rules", my_table),
				 errdetail("Deltas cannot be folded where a rule rewrites the statements."),
				 errhint("Drop the rules, or use triggers instead.")));
}

/* Find the column and check that the worker can write it. */
static Form_pg_attribute
required_column(Relation rel, const char *name)
{
	TupleDesc	desc = RelationGetDescr(rel);

	for (int i = 0; i < desc->natts; i++)
	{
		Form_pg_attribute att = TupleDescAttr(desc, i);

		if (att->attisdropped || strcmp(NameStr(att->attname), name) != 0)
			continue;
		if (att->attgenerated)
			ereport(ERROR,
					(errcode(ERRCODE_INVALID_TABLE_DEFINITION),
					 errmsg("column \"%s\" of table \"%s\" is a generated column",
							name, my_table)));
		return att;
	}
	ereport(ERROR,
			(errcode(ERRCODE_UNDEFINED_COLUMN),
			 errmsg("table \"%s\" has no column \"%s\"", my_table, name)));
}

/*
 * Does the table have its unique index?  Its columns must be those in key_set,
 * its predicate type = 'total'.  An index with that predicate on other columns
 * would make every fold fail, so it is refused, and named.
 */
static bool
has_total_index(Relation rel, Form_pg_attribute type, Bitmapset *key_set,
				bool has_keys)
{
	bool		found = false;
	ListCell   *lc;
	Expr	   *is_total;

	is_total = make_opclause(TextEqualOperator, BOOLOID, false,
							 (Expr *) makeVar(1, type->attnum, TEXTOID, -1,
											  type->attcollation, 0),
							 (Expr *) makeConst(TEXTOID, -1,
												DEFAULT_COLLATION_OID, -1,
												CStringGetTextDatum("total"),
												false, false),
							 InvalidOid, type->attcollation);
	set_opfuncid((OpExpr *) is_total);

	foreach(lc, RelationGetIndexList(rel))
	{
		Relation	index = index_open(lfirst_oid(lc), AccessShareLock);
		Form_pg_index form = index->rd_index;

		/* One that is not valid may be a twin that REINDEX is building. */
		if (form->indisunique && form->indisvalid &&
			equal(RelationGetIndexPredicate(index), list_make1(is_total)))
		{
			Bitmapset  *index_set = NULL;

			for (int i = 0; i < form->indnkeyatts; i++)
				index_set = bms_add_member(index_set,
										   form->indkey.values[i]);

			if (bms_is_member(0, index_set) ||	/* an expression */
				!bms_equal(index_set, key_set) ||
				(has_keys && !form->indnullsnotdistinct))
				ereport(ERROR,
						(errcode(ERRCODE_INVALID_TABLE_DEFINITION),
						 errmsg("index \"%s\" contradicts the key columns of table \"%s\"",
								RelationGetRelationName(index), my_table),
						 errhint("Drop index %s; the worker then makes the one it needs.",
								 quote_qualified_identifier(my_schema,
															RelationGetRelationName(index)))));
			found = true;
		}
		index_close(index, AccessShareLock);
	}
	return found;
}

/*
 * Refuse a statement that names another table than the one we have locked.
 *
 * The lock keeps the table from being renamed or replaced, but not its schema.
 * Somebody who renames that, and has a table of the same name ready in a new
 * one, would have his triggers run as the owner of the first.  The parser
 * calls this for each column reference of our own statements, first and when a
 * plan is made anew, before any code of the table can run.
 */
static Node *
check_statement_table(ParseState *pstate, ColumnRef *cref)
{
	ListCell   *lc;

	foreach(lc, pstate->p_rtable)
	{
		RangeTblEntry *rte = lfirst_node(RangeTblEntry, lc);

		if (rte->rtekind == RTE_RELATION && rte->relid != Table.relid)
			ereport(ERROR,
					(errcode(ERRCODE_OBJECT_IN_USE),
					 errmsg("table \"%s\" was replaced while it was being folded",
							my_table)));
	}
	return NULL;				/* let the parser go on as usual */
}

static void
setup_parser(ParseState *pstate, void *arg)
{
	static const Oid types[] = {TIDOID, TIDOID};

	setup_parse_fixed_parameters(pstate, types, lengthof(types));
	pstate->p_pre_columnref_hook = check_statement_table;
}

/*
 * Build the statements for a table with these key columns: "page, day" in
 * keys and "k1, k2" in aliases, which cannot be mistaken for value or rows;
 * both are NULL if there are none.
 *
 * The deltas of a range of blocks are first summed and then deleted, by two
 * statements under one snapshot: neither sees a delta that the other does not,
 * and none of them has to be carried from one to the other, as DELETE ...
 * RETURNING would.  A range of ctid is read in time proportional to its
 * blocks, whatever the size of the table.
 */
static void
build_statements(const char *keys, const char *aliases, const char *value_type)
{
	static const char *const range =
		"type OPERATOR(pg_catalog.=) 'delta'::pg_catalog.text"
		" AND ctid OPERATOR(pg_catalog.>=) $1";
	const char *keys_comma = keys ? psprintf("%s, ", keys) : "";
	const char *aliases_comma = keys ? psprintf("%s, ", aliases) : "";

	const char *group_by = keys ? psprintf(" GROUP BY %s", keys) : "";

	/* In the order of the index, each of its pages is met once: 30% less. */
	const char *order_by = keys ? psprintf(" ORDER BY %s", aliases) : "";

	Table.sql[FOLD_PROBE] =
		psprintf("SELECT ctid FROM ONLY %s WHERE %s LIMIT 1",
				 my_table, range);

	Table.sql[FOLD_ADD] =
		psprintf("WITH deltas (%svalue, rows) AS MATERIALIZED ("
				 "SELECT %sCAST(COALESCE(pg_catalog.sum(value), 0) AS %s),"
				 " pg_catalog.count(*)"
				 " FROM ONLY %s WHERE %s AND ctid OPERATOR(pg_catalog.<) $2%s"
				 "), totals AS ("
				 "INSERT INTO %s AS total (%stype, value)"
				 " SELECT %s'total', deltas.value FROM deltas%s"
				 " ON CONFLICT (%s)"
				 " WHERE type OPERATOR(pg_catalog.=) 'total'::pg_catalog.text"
				 " DO UPDATE SET value ="
				 " COALESCE(total.value, 0) OPERATOR(pg_catalog.+) excluded.value"
				 " RETURNING total.value"
				 ") SELECT"
				 " (SELECT CAST(pg_catalog.sum(rows) AS pg_catalog.int8) FROM deltas),"
				 " (SELECT pg_catalog.count(*) FROM deltas),"
				 " (SELECT pg_catalog.count(*) FROM totals),"
				 " (SELECT CAST(pg_catalog.max(value) AS pg_catalog.int8) FROM totals)",
				 aliases_comma, keys_comma, value_type,
				 my_table, range, group_by,
				 my_table, keys_comma, aliases_comma, order_by,
				 keys ? keys : "type");

	Table.sql[FOLD_DELETE] =
		psprintf("DELETE FROM ONLY %s WHERE %s"
				 " AND ctid OPERATOR(pg_catalog.<) $2",
				 my_table, range);
}

/*
 * Look at the table's columns and indexes, and prepare the statements.
 *
 * Returns NULL if all went well, or the command that makes the index if that
 * is missing.
 */
static char *
describe_table(Relation rel)
{
	TupleDesc	desc = RelationGetDescr(rel);
	Form_pg_attribute type = required_column(rel, "type");
	Form_pg_attribute value = required_column(rel, "value");
	StringInfoData keys;
	StringInfoData aliases;
	Bitmapset  *key_set = NULL;
	SPIPlanPtr	plan[NUM_FOLD_STATEMENTS];
	MemoryContext caller_context;

	/* What we know is no longer true, whatever we find. */
	Table.valid = false;

	if (type->atttypid != TEXTOID)
		ereport(ERROR,
				(errcode(ERRCODE_DATATYPE_MISMATCH),
				 errmsg("column \"type\" of table \"%s\" has type %s",
						my_table, format_type_be(type->atttypid)),
				 errdetail("It must have type text.")));
	if (value->atttypid != INT8OID && value->atttypid != INT4OID)
		ereport(ERROR,
				(errcode(ERRCODE_DATATYPE_MISMATCH),
				 errmsg("column \"value\" of table \"%s\" has type %s",
						my_table, format_type_be(value->atttypid)),
				 errdetail("It must have type bigint or integer.")));

	/* Every other column that is stored and not computed is a key. */
	initStringInfo(&keys);
	initStringInfo(&aliases);
	for (int i = 0; i < desc->natts; i++)
	{
		Form_pg_attribute att = TupleDescAttr(desc, i);

		if (att->attisdropped || att->attgenerated ||
			att == type || att == value)
			continue;
		appendStringInfo(&keys, "%s%s", keys.len > 0 ? ", " : "",
						 quote_identifier(NameStr(att->attname)));
		appendStringInfo(&aliases, "%sk%d", aliases.len > 0 ? ", " : "",
						 att->attnum);
		key_set = bms_add_member(key_set, att->attnum);
	}
	Table.has_keys = keys.len > 0;
	if (!Table.has_keys)
		key_set = bms_make_singleton(type->attnum);

	if (!has_total_index(rel, type, key_set, Table.has_keys))
		return create_index_command(Table.has_keys ? keys.data : NULL);

	/* If a statement cannot be prepared, the old plans are freed next time. */
	Table.relid = RelationGetRelid(rel);
	MemoryContextReset(Table.context);
	caller_context = MemoryContextSwitchTo(Table.context);
	build_statements(Table.has_keys ? keys.data : NULL, aliases.data,
					 value->atttypid == INT4OID ? "pg_catalog.int4" : "pg_catalog.int8");
	MemoryContextSwitchTo(caller_context);
	for (int i = 0; i < NUM_FOLD_STATEMENTS; i++)
	{
		/* Planning anew for each range would cost more than it can gain. */
		SPIPrepareOptions options = {
			.parserSetup = setup_parser,
			.cursorOptions = CURSOR_OPT_GENERIC_PLAN
		};

		plan[i] = SPI_prepare_extended(Table.sql[i], &options);
		if (plan[i] == NULL)
			elog(ERROR, "SPI_prepare_extended failed: %s",
				 SPI_result_code_string(SPI_result));
	}
	for (int i = 0; i < NUM_FOLD_STATEMENTS; i++)
	{
		if (Table.plan[i])
			SPI_freeplan(Table.plan[i]);
		SPI_keepplan(plan[i]);
		Table.plan[i] = plan[i];
	}
	Table.valid = true;
	return NULL;
}

/*
 * Open the worker's table, as its owner, under a lock that keeps it what it
 * is until the transaction ends: ROW EXCLUSIVE conflicts with every command
 * that changes its owner, kind, columns, triggers or rules, and lets writers
 * in.
 *
 * Returns NULL if something was missing and has been made.  The caller is then
 * to commit and call again; otherwise he is to call act_as_self().
 */
static Relation
open_table(SavedIdentity *saved)
{
	RangeVar   *name = makeRangeVar(my_schema, "counted", -1);
	Oid			relid;
	Relation	rel;

	/* Dropped while we run?  Restarting tells whether it is back. */
	if (!SearchSysCacheExists1(AUTHOID, ObjectIdGetDatum(GetUserId())))
		ereport(FATAL,
				(errcode(ERRCODE_INVALID_AUTHORIZATION_SPECIFICATION),
				 errmsg("role with OID %u was dropped", GetUserId())));

	relid = RangeVarGetRelid(name, RowExclusiveLock, true);
	if (!OidIsValid(relid))
	{
		make_table();
		return NULL;
	}

	rel = relation_open(relid, NoLock);
	check_kind(rel);
	act_as(rel->rd_rel->relowner, saved);
	if (!Table.valid || Table.relid != relid)
	{
		char	   *create_index;

		/* To look at an index is to run functions in its predicate. */
		PushActiveSnapshot(GetTransactionSnapshot());
		create_index = describe_table(rel);
		PopActiveSnapshot();

		if (create_index)
		{
			/* It wants the table closed; the lock stays. */
			relation_close(rel, NoLock);
			run_command(create_index);
			act_as_self(saved);
			return NULL;
		}
	}
	return rel;
}

/* Run one of the statements on the blocks from .. to - 1. */
static void
run_statement(FoldStatement which, BlockNumber from, BlockNumber to,
			  int expected)
{
	ItemPointerData bounds[2];
	ParamListInfo params = makeParamList(lengthof(bounds));
	SPIExecuteOptions options = {.params = params};
	int			rc;

	ItemPointerSet(&bounds[0], from, 0);
	ItemPointerSet(&bounds[1], to, 0);
	for (int i = 0; i < lengthof(bounds); i++)
	{
		params->params[i].value = PointerGetDatum(&bounds[i]);
		params->params[i].isnull = false;
		params->params[i].pflags = PARAM_FLAG_CONST;
		params->params[i].ptype = TIDOID;
	}

	pgstat_report_activity(STATE_RUNNING, Table.sql[which]);
	rc = SPI_execute_plan_extended(Table.plan[which], &options);
	if (rc != expected)
		elog(ERROR, "SPI_execute_plan_extended failed: %s",
			 SPI_result_code_string(rc));
}

/* The nth column of the one row that the last statement returned. */
static int64
result_int64(int n)
{
	bool		isnull;
	Datum		value;

	if (SPI_processed != 1)
		elog(ERROR, "expected one row, got " UINT64_FORMAT, SPI_processed);
	value = SPI_getbinval(SPI_tuptable->vals[0], SPI_tuptable->tupdesc,
						  n, &isnull);
	return isnull ? 0 : DatumGetInt64(value);
}

/*
 * Fold the deltas in the blocks from .. to - 1, and say in *result what that
 * comes to.  A trigger of the table's owner can suppress an insert or a
 * delete; then the count would come out wrong, so the whole transaction is
 * given up.
 */
static void
fold_blocks(BlockNumber from, BlockNumber to, CycleResult *result)
{
	int64		sums;

	run_statement(FOLD_ADD, from, to, SPI_OK_SELECT);
	result->rows = result_int64(1);
	sums = result_int64(2);
	result->totals = result_int64(3);
	result->total = result_int64(4);

	run_statement(FOLD_DELETE, from, to, SPI_OK_DELETE);
	if ((int64) SPI_processed != result->rows || sums != result->totals)
		ereport(ERROR,
				(errcode(ERRCODE_TRIGGERED_DATA_CHANGE_VIOLATION),
				 errmsg("cannot fold table \"%s\"", my_table),
				 errdetail("A trigger keeps rows from being inserted, updated or deleted.")));
}

/* The table is there and fit: tell the log, and whoever waits for us. */
static void
report_ready(void)
{
	ready = true;
	ereport(LOG,
			(errmsg("%s initialized with %s",
					MyBgworkerEntry->bgw_name, my_table),
			 errhidecontext(true)));

	lock_slots(LW_EXCLUSIVE);
	MySlot->state = WORKER_FOLDING;
	if (!Shared)
		MySlot->launcher = NULL;
	else if (MySlot->launcher)
		SetLatch(MySlot->launcher);
	unlock_slots();
}

/*
 * The body of a cycle: a series of short transactions, whatever the backlog.
 *
 * Each looks for the first block with a delta and folds the range of blocks
 * that begins there.  So a cycle without deltas is one read-only scan: no
 * transaction id, no WAL.  Blocks that are added meanwhile are left for the
 * next cycle.
 */
static void
fold(void)
{
	BlockNumber next = 0;		/* first block not yet folded */
	BlockNumber nblocks = 0;	/* where the table ended at the start */
	Oid			relfilenode = InvalidOid;	/* the file those blocks are in */
	bool		done = false;

	while (!done)
	{
		CycleResult result = {0};	/* of this transaction */
		bool		notify = false;
		SavedIdentity saved;
		Relation	rel;

		/* now() in a trigger, and pg_stat_activity, take the time from here */
		SetCurrentStatementStartTimestamp();
		StartTransactionCommand();
		if (SPI_connect() != SPI_OK_CONNECT)
			elog(ERROR, "SPI_connect failed");

		rel = open_table(&saved);
		if (rel && ready)
		{
			/* The snapshot is taken under the lock, and serves to the end. */
			PushActiveSnapshot(GetTransactionSnapshot());

			/* VACUUM FULL and the like move what is left: begin again. */
			if (relfilenode != rel->rd_rel->relfilenode)
			{
				relfilenode = rel->rd_rel->relfilenode;
				next = 0;
				nblocks = RelationGetNumberOfBlocks(rel);
			}

			/*
			 * Deferred triggers would fire at commit, when we are no longer
			 * the owner; the server refuses to queue them.
			 */
			if (rel->trigdesc)
				run_command("SET CONSTRAINTS ALL IMMEDIATE");

			run_statement(FOLD_PROBE, next, 0, SPI_OK_SELECT);
			if (SPI_processed == 0)
				done = true;
			else
			{
				bool		isnull;
				Datum		tid = SPI_getbinval(SPI_tuptable->vals[0],
												SPI_tuptable->tupdesc,
												1, &isnull);
				BlockNumber first = ItemPointerGetBlockNumber((ItemPointer) DatumGetPointer(tid));

				if (first < nblocks)
				{
					BlockNumber range = Table.has_keys ?
						BLOCKS_PER_FOLD_WITH_KEYS : BLOCKS_PER_FOLD;

					next = first + Min(range, nblocks - first);
					fold_blocks(first, next, &result);
				}
				done = (first >= nblocks || next >= nblocks);
			}

			/*
			 * One notification for the cycle, delivered when this commits;
			 * also for what an earlier one did before it failed.
			 */
			notify = done && (Cycle.unnotified || result.rows > 0);
			if (notify && worker_spi_notify)
				Async_Notify("worker_spi",
							 Table.has_keys ? my_table :
							 psprintf("%s " INT64_FORMAT, my_table,
									  result.rows > 0 ? result.total : Cycle.total));
			PopActiveSnapshot();
		}
		if (rel)
		{
			act_as_self(&saved);
			relation_close(rel, NoLock);
		}

		SPI_finish();
		CommitTransactionCommand();

		if (rel && !ready)
			report_ready();

		if (result.rows > 0)
		{
			Cycle.rows += result.rows;
			Cycle.totals += result.totals;
			Cycle.total = result.total;
			lock_slots(LW_EXCLUSIVE);
			MySlot->folded_rows += result.rows;
			unlock_slots();
		}
		Cycle.unnotified = !notify && (Cycle.unnotified || result.rows > 0);

		/*
		 * Between two transactions nothing of ours is in anybody's way.  A
		 * long cycle must not go on without a postmaster either.
		 */
		CHECK_FOR_INTERRUPTS();
		if (!PostmasterIsAlive())
			proc_exit(1);
		if (!done && gives_way() && database_is_wanted())
			give_way();
	}
}
