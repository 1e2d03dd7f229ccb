/* -------------------------------------------------------------------------
 *
 * worker_spi.c
 *		Background workers that fold the deltas of a counter into its total.
 *
 * An UPDATE of one hot row by many clients queues up on the row's lock;
 * INSERTs do not.  So clients insert rows ('delta', n) into schemaN.counted,
 * and a background worker, number N, adds them to the one row ('total', m)
 * every now and then, deleting them in the same transaction.  At every
 * instant, for every snapshot, sum(value) over the table is the true count.
 *
 * Processes
 *		postmaster		loads the library, registers the static workers, starts
 *						every worker and restarts those that exit with code 1
 *		worker			connects to one database, sleeps on its latch, folds
 *		backend			runs the SQL functions: launch, fold, stop, the view,
 *						and the trigger that wakes a worker at commit
 *
 * Data flow
 *		The postmaster hands a worker its number and database in bgw_extra, by
 *		value: a pointer would mean nothing in another process.  Everything
 *		else that processes tell each other stands in one WorkerSlot for each
 *		registered worker, in shared memory.
 *
 * Locking
 *		One LWLock guards all slots.  It is held to copy a few fields, never
 *		while anything can raise an error, wait or run SQL.  Latches are set,
 *		and signals sent, while it is held: the worker clears its latch and
 *		pid from the slot under the same lock before it exits, so neither can
 *		belong to another process by then.
 *
 * Errors
 *		A failed cycle never ends the worker: the error is caught in the
 *		process, the transaction rolled back, the error reported once, and the
 *		cycle tried again after a growing delay.  What ends the process, ends
 *		it with exit code 1, "start me again after bgw_restart_time", or with
 *		exit code 0, "forget about me".
 *
 * Without shared_preload_libraries there is no shared memory and there are no
 * static workers; launching still works, in a simpler way.
 *
 * Copyright (c) 2026, worker_spi contributors
 *
 * -------------------------------------------------------------------------
 */

#include "postgres.h"

#include <signal.h>

#include "access/xact.h"
#include "catalog/pg_authid.h"
#include "catalog/pg_database.h"
#include "catalog/pg_type.h"
#include "commands/dbcommands.h"
#include "commands/trigger.h"
#include "fmgr.h"
#include "funcapi.h"
#include "mb/pg_wchar.h"
#include "miscadmin.h"
#include "pgstat.h"
#include "storage/ipc.h"
#include "storage/shmem.h"
#include "utils/array.h"
#include "utils/builtins.h"
#include "utils/guc.h"
#include "utils/lsyscache.h"
#include "utils/memutils.h"
#include "utils/rel.h"
#include "utils/syscache.h"
#include "worker_spi.h"

#define WORKER_SPI_VERSION "1.0"

#ifdef PG_MODULE_MAGIC_EXT		/* 18: pg_get_loaded_modules() shows these */
PG_MODULE_MAGIC_EXT(.name = "worker_spi",.version = WORKER_SPI_VERSION);
#else
PG_MODULE_MAGIC;
#endif

/* -------------------------------------------------------------------------
 * Types
 * -------------------------------------------------------------------------
 */

/* A launch under way, for its cleanup. */
typedef struct Launch
{
	BackgroundWorkerHandle *handle;
	WorkerSlot *slot;			/* NULL without shared memory */
	uint64		generation;
} Launch;

/* A worker to wake when the current transaction commits. */
typedef struct PendingWake
{
	int			index;
	int			nestlevel;		/* of the subtransaction that asked for it */
} PendingWake;

/* -------------------------------------------------------------------------
 * Shared state, settings, and what a process keeps for itself
 * -------------------------------------------------------------------------
 */

/* Names of the states, for the view; in the order of WorkerState. */
static const char *const state_names[] = {
	"starting", "idle", "folding", "backoff"
};

/* Shared memory; NULL when the library is not preloaded. */
WorkerSpiShared *Shared = NULL;

static shmem_request_hook_type prev_shmem_request_hook = NULL;
static shmem_startup_hook_type prev_shmem_startup_hook = NULL;

/* Settings. */
int			worker_spi_naptime = 10;
static int	worker_spi_total_workers = 2;
char	   *worker_spi_database = NULL;
char	   *worker_spi_role = NULL;
static int	worker_spi_restart_interval = 5;
bool		worker_spi_log_folds = true;
int			worker_spi_wake_delay = 50;
bool		worker_spi_notify = false;

/* In a backend: workers to wake at commit. */
static List *pending_wakes = NIL;

PG_FUNCTION_INFO_V1(worker_spi_launch);
PG_FUNCTION_INFO_V1(worker_spi_fold);
PG_FUNCTION_INFO_V1(worker_spi_stop);
PG_FUNCTION_INFO_V1(worker_spi_wake);
PG_FUNCTION_INFO_V1(worker_spi_get_workers);

void		_PG_init(void);

static bool check_database(char **newval, void **extra, GucSource source);
static bool check_role(char **newval, void **extra, GucSource source);
static void request_shmem(void);
static void startup_shmem(void);
static void fill_worker(BackgroundWorker *worker, const WorkerParams *params,
						int slotno, pid_t notify_pid);

/* -------------------------------------------------------------------------
 * Library load
 * -------------------------------------------------------------------------
 */

/*
 * Runs once in each process that loads the library: in the postmaster if it
 * is preloaded, and the children inherit the result; otherwise in each backend
 * that calls one of the functions, and in each worker.
 */
void
_PG_init(void)
{
	DefineCustomIntVariable("worker_spi.naptime",
							"Sets how long a worker sleeps between two cycles.",
							NULL,
							&worker_spi_naptime,
							10,
							1,
							INT_MAX / 1000, /* in ms it must fit an int */
							PGC_SIGHUP,
							GUC_UNIT_S,
							NULL, NULL, NULL);

	DefineCustomStringVariable("worker_spi.database",
							   "Sets the database of the static workers.",
							   "It is also that of worker_spi_launch() without a database.",
							   &worker_spi_database,
							   "postgres",
							   PGC_SIGHUP,
							   0,
							   check_database, NULL, NULL);

	DefineCustomStringVariable("worker_spi.role",
							   "Sets the role of the static workers.",
							   "If empty, it is the bootstrap superuser.",
							   &worker_spi_role,
							   "",
							   PGC_SIGHUP,
							   0,
							   check_role, NULL, NULL);

	DefineCustomBoolVariable("worker_spi.log_folds",
							 "Sets whether each cycle that folded something is logged.",
							 NULL,
							 &worker_spi_log_folds,
							 true,
							 PGC_SIGHUP,
							 0,
							 NULL, NULL, NULL);

	DefineCustomIntVariable("worker_spi.wake_delay",
							"Sets how long a worker woken by a commit waits for more deltas.",
							NULL,
							&worker_spi_wake_delay,
							50,
							0,
							10000,
							PGC_SIGHUP,
							GUC_UNIT_MS,
							NULL, NULL, NULL);

	DefineCustomBoolVariable("worker_spi.notify",
							 "Sets whether changed totals are notified on channel \"worker_spi\".",
							 NULL,
							 &worker_spi_notify,
							 false,
							 PGC_SIGHUP,
							 0,
							 NULL, NULL, NULL);

	/*
	 * The rest takes effect at server start only, and a PGC_POSTMASTER
	 * variable defined later would be a fatal error for the session.
	 */
	if (process_shared_preload_libraries_in_progress)
	{
		DefineCustomIntVariable("worker_spi.total_workers",
								"Sets the number of static workers.",
								NULL,
								&worker_spi_total_workers,
								2,
								0,
								100,
								PGC_POSTMASTER,
								0,
								NULL, NULL, NULL);

		DefineCustomIntVariable("worker_spi.restart_interval",
								"Sets after how long the server restarts a worker that ended.",
								NULL,
								&worker_spi_restart_interval,
								5,
								1,
								3600,
								PGC_POSTMASTER,
								GUC_UNIT_S,
								NULL, NULL, NULL);
	}

	/* A misspelt worker_spi.something is refused instead of ignored. */
	MarkGUCPrefixReserved("worker_spi");

	if (!process_shared_preload_libraries_in_progress)
		return;

	/*
	 * pg_upgrade starts both clusters with their libraries loaded.  A worker
	 * would write into one of them, or hold the connection that pg_upgrade
	 * must not find.
	 */
	if (IsBinaryUpgrade)
		return;

	/* Other libraries want shared memory too, so call them first. */
	prev_shmem_request_hook = shmem_request_hook;
	shmem_request_hook = request_shmem;
	prev_shmem_startup_hook = shmem_startup_hook;
	shmem_startup_hook = startup_shmem;

	for (int i = 1; i <= worker_spi_total_workers; i++)
	{
		BackgroundWorker worker;
		WorkerParams params = {.generation = i,.index = i,.is_static = true};

		fill_worker(&worker, &params, i - 1, 0);
		RegisterBackgroundWorker(&worker);
	}
}

/*
 * Both strings become names of objects; one that cannot be a name is refused
 * when it is set, not each time a worker starts.
 */
static bool
check_database(char **newval, void **extra, GucSource source)
{
	if ((*newval)[0] == '\0')
	{
		GUC_check_errdetail("The name of a database cannot be empty.");
		return false;
	}
	return check_role(newval, extra, source);
}

static bool
check_role(char **newval, void **extra, GucSource source)
{
	if (strlen(*newval) >= NAMEDATALEN)
	{
		GUC_check_errdetail("A name has at most %d bytes.", NAMEDATALEN - 1);
		return false;
	}
	return true;
}

/* -------------------------------------------------------------------------
 * Shared memory
 * -------------------------------------------------------------------------
 */

/* Every registered worker has a slot, and there can be no more than these. */
static Size
shmem_size(void)
{
	return add_size(offsetof(WorkerSpiShared, slots),
					mul_size(max_worker_processes, sizeof(WorkerSlot)));
}

/* Ask for shared memory, at the only time when that is possible. */
static void
request_shmem(void)
{
	if (prev_shmem_request_hook)
		prev_shmem_request_hook();

	RequestAddinShmemSpace(MAXALIGN(shmem_size()));
	RequestNamedLWLockTranche("worker_spi", 1);
}

/* Give a free slot to a registration.  The caller holds the lock. */
static void
occupy_slot(WorkerSlot *slot, const WorkerParams *params)
{
	memset(slot, 0, offsetof(WorkerSlot, wake));
	slot->generation = params->generation;
	slot->params = *params;
	slot->dboid = params->dboid;
	slot->roleoid = params->roleoid;
	slot->state = WORKER_STARTING;
	pg_atomic_write_u32(&slot->wake, 0);
}

/*
 * Forget a registration.  The caller holds the lock, and has yet to wake those
 * who wait for the slot to change.
 */
void
free_slot(WorkerSlot *slot)
{
	slot->generation = 0;
	slot->dboid = InvalidOid;
}

/*
 * Set up shared memory: at server start, and once more after each crash, when
 * all of it is gone.
 *
 * What is registered then is in the postmaster's own list, which survives a
 * crash: all static workers but those that were stopped, and the dynamic ones
 * that may be restarted.  Their slots are made from it, so that the slots tell
 * the truth before the first worker has started.  (A worker that was stopped
 * while it had no process stays in the list until its restart is due.)
 */
static void
startup_shmem(void)
{
	bool		found;
	registered_iter iter;

	if (prev_shmem_startup_hook)
		prev_shmem_startup_hook();

	LWLockAcquire(AddinShmemInitLock, LW_EXCLUSIVE);
	Shared = ShmemInitStruct("worker_spi", shmem_size(), &found);
	if (!found)
	{
		memset(Shared, 0, shmem_size());
		Shared->lock = &GetNamedLWLockTranche("worker_spi")->lock;
		Shared->nslots = max_worker_processes;
		for (int i = 0; i < Shared->nslots; i++)
		{
			pg_atomic_init_u32(&Shared->slots[i].wake, 0);
			ConditionVariableInit(&Shared->slots[i].changed);
		}

		registered_foreach(iter)
		{
			RegisteredBgWorker *rw = registered_worker(iter);
			WorkerParams params;
			WorkerSlot *slot;

			if (rw->rw_terminate ||
				strcmp(rw->rw_worker.bgw_library_name, "worker_spi") != 0)
				continue;

			memcpy(&params, rw->rw_worker.bgw_extra, sizeof(params));
			slot = &Shared->slots[DatumGetInt32(rw->rw_worker.bgw_main_arg)];

			/* One that lingers may share its slot with a newer one. */
			if (params.generation > slot->generation)
				occupy_slot(slot, &params);
			Shared->last_generation = Max(Shared->last_generation,
										  params.generation);
		}
	}
	LWLockRelease(AddinShmemInitLock);
}

/*
 * Find the slot of worker index in database dboid.  A static worker that is
 * not connected counts for static_dboid, the database it will connect to.  The
 * caller holds the lock.
 */
static WorkerSlot *
find_slot(int index, Oid dboid, Oid static_dboid)
{
	for (int i = 0; i < Shared->nslots; i++)
	{
		WorkerSlot *slot = &Shared->slots[i];

		if (slot->generation != 0 && slot->params.index == index &&
			(OidIsValid(slot->dboid) ? slot->dboid : static_dboid) == dboid)
			return slot;
	}
	return NULL;
}

/* -------------------------------------------------------------------------
 * Registration
 * -------------------------------------------------------------------------
 */

/*
 * Fill in the registration of a worker of either kind.
 *
 *		params		what the worker is to know
 *		slotno		its slot, or -1 without shared memory
 *		notify_pid	backend that the postmaster is to signal when the worker
 *					starts or ends, or 0
 */
static void
fill_worker(BackgroundWorker *worker, const WorkerParams *params, int slotno,
			pid_t notify_pid)
{
	const char *type = params->is_static ? "worker_spi" : "worker_spi dynamic";

	/* Zeroed, so that no field holds what happened to be on the stack. */
	memset(worker, 0, sizeof(*worker));
	worker->bgw_flags = BGWORKER_SHMEM_ACCESS |
		BGWORKER_BACKEND_DATABASE_CONNECTION;
#ifdef BGWORKER_INTERRUPTIBLE
	/* A static worker so marked would be unregistered, and never return. */
	if (params->interruptible)
		worker->bgw_flags |= BGWORKER_INTERRUPTIBLE;
#endif

	/* Not on a standby, where there is nothing to write. */
	worker->bgw_start_time = BgWorkerStart_RecoveryFinished;

	/* Left at 0, this would be an endless loop at full speed. */
	worker->bgw_restart_time = slotno >= 0 ?
		worker_spi_restart_interval : BGW_NEVER_RESTART;

	/* The size of these fields differs between versions. */
	snprintf(worker->bgw_library_name, sizeof(worker->bgw_library_name),
			 "worker_spi");
	snprintf(worker->bgw_function_name, sizeof(worker->bgw_function_name),
			 "worker_spi_main");
	snprintf(worker->bgw_name, sizeof(worker->bgw_name), "%s worker %d",
			 type, params->index);
	snprintf(worker->bgw_type, sizeof(worker->bgw_type), "%s", type);

	worker->bgw_main_arg = Int32GetDatum(slotno);
	memcpy(worker->bgw_extra, params, sizeof(*params));
	worker->bgw_notify_pid = notify_pid;
}

/* -------------------------------------------------------------------------
 * SQL functions
 * -------------------------------------------------------------------------
 */

/*
 * A function of another version's SQL script has other arguments, and reading
 * one that was not passed is reading beyond the end.
 */
static void
check_nargs(FunctionCallInfo fcinfo, int expected)
{
	if (PG_NARGS() != expected)
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_FUNCTION_DEFINITION),
				 errmsg("function has %d arguments where the library expects %d",
						PG_NARGS(), expected),
				 errhint("DROP EXTENSION worker_spi, and CREATE it again.")));
}

static void
check_index(int index)
{
	if (index < 0)
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
				 errmsg("index of a worker cannot be negative: %d", index)));
}

static void
require_shared_memory(void)
{
	if (!Shared)
		ereport(ERROR,
				(errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
				 errmsg("worker_spi must be loaded via \"shared_preload_libraries\""),
				 errhint("Add worker_spi to \"shared_preload_libraries\" and restart the server.")));
}

/* A worker starts when recovery has ended, and nobody can wait that long. */
static void
require_no_recovery(void)
{
	if (RecoveryInProgress())
		ereport(ERROR,
				(errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
				 errmsg("recovery is in progress"),
				 errhint("Workers run on the primary server only.")));
}

/*
 * The database that a caller means by dboid.  With 0 it is that of the static
 * workers, invalid if there is no such database and missing_ok.
 */
static Oid
resolve_database(Oid dboid, bool missing_ok)
{
	if (!OidIsValid(dboid))
		return get_database_oid(worker_spi_database, missing_ok);

	if (!SearchSysCacheExists1(DATABASEOID, ObjectIdGetDatum(dboid)))
		ereport(ERROR,
				(errcode(ERRCODE_UNDEFINED_DATABASE),
				 errmsg("database with OID %u does not exist", dboid)));
	return dboid;
}

/* The role of a static worker that is not connected; invalid if it is gone. */
static Oid
static_role(void)
{
	return worker_spi_role[0] != '\0' ?
		get_role_oid(worker_spi_role, true) : BOOTSTRAP_SUPERUSERID;
}

/* The role that the caller of worker_spi_launch() means by roleoid. */
static Oid
resolve_role(Oid roleoid)
{
	if (!OidIsValid(roleoid))
	{
		if (worker_spi_role[0] != '\0')
			return get_role_oid(worker_spi_role, false);
		return superuser() ? BOOTSTRAP_SUPERUSERID : GetUserId();
	}

	if (!SearchSysCacheExists1(AUTHOID, ObjectIdGetDatum(roleoid)))
		ereport(ERROR,
				(errcode(ERRCODE_UNDEFINED_OBJECT),
				 errmsg("role with OID %u does not exist", roleoid)));
	return roleoid;
}

/* The name of a role for a message, or its OID if it is gone. */
char *
role_name(Oid roleoid)
{
	char	   *name = GetUserNameFromId(roleoid, true);

	return name ? name : psprintf("%u", roleoid);
}

/* The caller may use a worker's role only as far as SET ROLE would let him. */
static void
check_may_act_as(Oid roleoid)
{
	if (!can_act_as(GetUserId(), roleoid))
		ereport(ERROR,
				(errcode(ERRCODE_INSUFFICIENT_PRIVILEGE),
				 errmsg("permission denied for a worker of role \"%s\"",
						role_name(roleoid)),
				 errdetail("Only members of that role may launch, fold or stop its workers.")));
}

/* Translate the flags argument of worker_spi_launch(). */
static uint32
parse_flags(ArrayType *array)
{
	static const struct
	{
		const char *name;
		uint32		flag;
	}			known[] = {
		{"ALLOWCONN", BGWORKER_BYPASS_ALLOWCONN},
#ifdef BGWORKER_BYPASS_ROLELOGINCHECK
		{"ROLELOGINCHECK", BGWORKER_BYPASS_ROLELOGINCHECK},
#endif
	};
	uint32		flags = 0;
	Datum	   *elements;
	int			nelements;

	if (ARR_NDIM(array) > 1)
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
				 errmsg("flags must be a one-dimensional array")));
	if (array_contains_nulls(array))
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
				 errmsg("flags cannot contain NULL")));

	deconstruct_array(array, TEXTOID, -1, false, TYPALIGN_INT,
					  &elements, NULL, &nelements);
	for (int i = 0; i < nelements; i++)
	{
		char	   *name = TextDatumGetCString(elements[i]);
		uint32		flag = 0;

		for (int j = 0; j < lengthof(known); j++)
			if (strcmp(name, known[j].name) == 0)
				flag = known[j].flag;
		if (flag == 0)
			ereport(ERROR,
					(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
					 errmsg("unrecognized flag \"%s\"", name),
					 errhint("Flags are \"ALLOWCONN\" and, on servers from 17 on, \"ROLELOGINCHECK\".")));
		flags |= flag;
	}
	return flags;
}

static void
duplicate_worker_error(int index)
{
	ereport(ERROR,
			(errcode(ERRCODE_DUPLICATE_OBJECT),
			 errmsg("a worker with index %d already runs in that database",
					index)));
}

static void
no_slot_error(void)
{
	ereport(ERROR,
			(errcode(ERRCODE_CONFIGURATION_LIMIT_EXCEEDED),
			 errmsg("no background worker slot is left"),
			 errhint("Consider increasing the configuration parameter \"max_worker_processes\", which is %d.",
					 max_worker_processes)));
}

/* Reserve a slot for a launch, of which there can be only one at a time. */
static WorkerSlot *
reserve_slot(WorkerParams *params)
{
	Oid			static_dboid = resolve_database(InvalidOid, true);
	WorkerSlot *slot = NULL;
	bool		duplicate;

	LWLockAcquire(Shared->lock, LW_EXCLUSIVE);
	duplicate = find_slot(params->index, params->dboid, static_dboid) != NULL;
	if (!duplicate)
	{
		for (int i = 0; i < Shared->nslots && !slot; i++)
			if (Shared->slots[i].generation == 0)
				slot = &Shared->slots[i];
		if (slot)
		{
			params->generation = ++Shared->last_generation;
			occupy_slot(slot, params);
			slot->launcher = MyLatch;
		}
	}
	LWLockRelease(Shared->lock);

	if (duplicate)
		duplicate_worker_error(params->index);
	if (!slot)
		no_slot_error();
	return slot;
}

/*
 * Undo a launch: no process, no registration and no slot is left behind.
 *
 * It runs when the launch failed, and when the caller is cancelled or
 * terminated.  The wait is short, since the worker obeys SIGTERM wherever it
 * is, and must not be cut short.
 */
static void
undo_launch(int code, Datum arg)
{
	Launch	   *launch = (Launch *) DatumGetPointer(arg);

	if (launch->handle)
	{
		HOLD_INTERRUPTS();
		TerminateBackgroundWorker(launch->handle);
		(void) WaitForBackgroundWorkerShutdown(launch->handle);
		RESUME_INTERRUPTS();
	}
	if (launch->slot)
	{
		Assert(Shared);
		LWLockAcquire(Shared->lock, LW_EXCLUSIVE);
		if (launch->slot->generation == launch->generation)
			free_slot(launch->slot);
		LWLockRelease(Shared->lock);
		ConditionVariableBroadcast(&launch->slot->changed);
	}
}

/*
 * Wait until the worker is in its loop, and return its pid, or 0 if it ended
 * before.  We are woken by the worker, when it is ready, and by the
 * postmaster, when it starts or ends; without shared memory there is only the
 * worker's lock to look at.
 *
 * A worker can be ready before the postmaster has noted its pid.  We wait for
 * that as well: worker_spi_stop() relies on it.
 */
static pid_t
wait_until_ready(Launch *launch, const LOCKTAG *tag)
{
	for (;;)
	{
		pid_t		pid = 0;
		BgwHandleStatus status = GetBackgroundWorkerPid(launch->handle, &pid);
		bool		is_ready = false;

		if (status == BGWH_STOPPED)
			return 0;

		if (status == BGWH_STARTED && launch->slot)
		{
			Assert(Shared);
			LWLockAcquire(Shared->lock, LW_EXCLUSIVE);
			is_ready = launch->slot->state != WORKER_STARTING;
			if (is_ready)
				launch->slot->launcher = NULL;	/* now it is on its own */
			LWLockRelease(Shared->lock);
		}
		else if (status == BGWH_STARTED)
			is_ready = LockHasWaiters(tag, ExclusiveLock, false);

		if (is_ready)
			return pid;

		(void) WaitLatch(MyLatch,
						 WL_LATCH_SET | WL_EXIT_ON_PM_DEATH |
						 (launch->slot ? 0 : WL_TIMEOUT),
						 10, WAIT_EVENT_BGWORKER_STARTUP);
		ResetLatch(MyLatch);
		CHECK_FOR_INTERRUPTS();
	}
}

/* A text from a worker, whose database may have another encoding than ours. */
static char *
readable_text(char *text)
{
	if (!pg_verifymbstr(text, strlen(text), true))
		for (char *p = text; *p; p++)
			if (IS_HIGHBIT_SET(*p))
				*p = '?';
	return text;
}

/* Raise an error of a worker, if it is one, as the caller's own. */
static void
raise_worker_error(WorkerError *error, int index)
{
	if (error->sqlstate != 0)
		ereport(ERROR,
				(errcode(error->sqlstate),
				 errmsg_internal("%s", readable_text(error->message)),
				 error->detail[0] ? errdetail_internal("%s", readable_text(error->detail)) : 0,
				 error->hint[0] ? errhint("%s", readable_text(error->hint)) : 0,
				 errcontext("worker_spi worker %d", index)));
}

/*
 * worker_spi_launch(index int4, dboid oid, roleoid oid, flags text[],
 *					 interruptible bool) RETURNS int4
 *
 * Start a dynamic worker and return its pid.  With shared memory that is when
 * it is in its loop and its table exists; an error that keeps it from getting
 * there is raised here, and nothing is left behind.  Without, it is when the
 * process has started.
 *
 * Errors: 22023 for a negative index or wrong flags, 3D000, 42704, 42501,
 * 42710 if there is such a worker, 53400 if there is no slot, and whatever the
 * worker dies of.
 */
Datum
worker_spi_launch(PG_FUNCTION_ARGS)
{
	WorkerParams params = {0};
	BackgroundWorker worker;
	Launch		launch = {0};
	LOCKTAG		tag;
	pid_t		pid;

	check_nargs(fcinfo, 5);
	params.index = PG_GETARG_INT32(0);
	check_index(params.index);
	params.connflags = parse_flags(PG_GETARG_ARRAYTYPE_P(3));
	params.dboid = resolve_database(PG_GETARG_OID(1), false);
	params.roleoid = resolve_role(PG_GETARG_OID(2));
	params.interruptible = PG_GETARG_BOOL(4);

	if (params.connflags != 0 && !superuser())
		ereport(ERROR,
				(errcode(ERRCODE_INSUFFICIENT_PRIVILEGE),
				 errmsg("permission denied to use flags"),
				 errdetail("Only a superuser may bypass the checks on connections.")));
	check_may_act_as(params.roleoid);
	if (database_aclcheck(params.dboid, GetUserId(), ACL_CONNECT) != ACLCHECK_OK)
		aclcheck_error(ACLCHECK_NO_PRIV, OBJECT_DATABASE,
					   get_database_name(params.dboid));
	require_no_recovery();

	if (Shared)
	{
		launch.slot = reserve_slot(&params);
		launch.generation = params.generation;
	}
	else
	{
		/* The lock that the worker will hold for life, until it queues up. */
		SET_LOCKTAG_WORKER(tag, params.dboid, params.index);
		if (LockAcquire(&tag, ExclusiveLock, false, true) ==
			LOCKACQUIRE_NOT_AVAIL)
			duplicate_worker_error(params.index);
	}

	/* A terminated caller skips PG_CATCH, so this must be an exit callback. */
	PG_ENSURE_ERROR_CLEANUP(undo_launch, PointerGetDatum(&launch));
	{
		fill_worker(&worker, &params,
					launch.slot ? launch.slot - Shared->slots : -1,
					MyProcPid);
		if (!RegisterDynamicBackgroundWorker(&worker, &launch.handle))
			no_slot_error();

		pid = wait_until_ready(&launch, &tag);
		if (pid == 0)
		{
			WorkerError error = {0};
			bool		stopped = false;

			if (launch.slot)
			{
				Assert(Shared);
				LWLockAcquire(Shared->lock, LW_SHARED);
				stopped = launch.slot->stop;
				error = launch.slot->last_error;
				LWLockRelease(Shared->lock);
			}
			if (stopped)
				ereport(ERROR,
						(errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
						 errmsg("worker with index %d was stopped before it was ready",
								params.index)));
			raise_worker_error(&error, params.index);
			ereport(ERROR,
					(errcode(ERRCODE_INSUFFICIENT_RESOURCES),
					 errmsg("could not start %s", worker.bgw_name),
					 errhint("More details may be available in the server log.")));
		}
	}
	PG_END_ENSURE_ERROR_CLEANUP(undo_launch, PointerGetDatum(&launch));

	if (!launch.slot)
		LockRelease(&tag, ExclusiveLock, false);
	PG_RETURN_INT32(pid);
}

/*
 * Find the worker that a caller of fold or stop means, check that he may, and
 * return with the lock on the slots held; NULL, without the lock, if there is
 * none.
 */
static WorkerSlot *
find_and_lock_worker(FunctionCallInfo fcinfo)
{
	int			index = PG_GETARG_INT32(0);
	Oid			static_dboid;
	Oid			static_roleoid;
	Oid			dboid;
	WorkerSlot *slot;

	check_index(index);
	require_shared_memory();
	static_dboid = resolve_database(InvalidOid, true);
	static_roleoid = static_role();
	if (!OidIsValid(static_roleoid))
		static_roleoid = BOOTSTRAP_SUPERUSERID;
	dboid = OidIsValid(PG_GETARG_OID(1)) ?
		resolve_database(PG_GETARG_OID(1), false) : static_dboid;

	for (;;)
	{
		Oid			roleoid;
		uint64		generation;

		LWLockAcquire(Shared->lock, LW_EXCLUSIVE);
		slot = find_slot(index, dboid, static_dboid);
		if (!slot)
		{
			LWLockRelease(Shared->lock);
			return NULL;
		}
		roleoid = OidIsValid(slot->roleoid) ? slot->roleoid : static_roleoid;
		generation = slot->generation;
		LWLockRelease(Shared->lock);

		/* This reads catalogs, and can fail: not under an LWLock. */
		check_may_act_as(roleoid);

		LWLockAcquire(Shared->lock, LW_EXCLUSIVE);
		if (slot->generation == generation &&
			(slot->roleoid == roleoid || !OidIsValid(slot->roleoid)))
			return slot;
		LWLockRelease(Shared->lock);
	}
}

/*
 * worker_spi_fold(index int4, dboid oid, wait bool) RETURNS bool
 *
 * Make a worker fold now.  With wait, return when every delta that was
 * committed before the call is in a total: a ticket is taken, and the cycle
 * that serves it starts, and takes its snapshots, afterwards.  One cycle
 * serves all who have a ticket by then.
 *
 * Returns false if there is no such worker.  Errors: 22023, 3D000, 42501,
 * 55000 without shared memory, during recovery or if the worker has no
 * process, and that of the cycle if it failed.
 */
Datum
worker_spi_fold(PG_FUNCTION_ARGS)
{
	WorkerSlot *slot;
	uint64		generation;
	uint64		ticket;
	int64		starts;
	WorkerError error;
	bool		gone;
	bool		served = false;
	static uint32 wait_event = 0;

	check_nargs(fcinfo, 3);
	if (wait_event == 0)
		wait_event = define_wait_event("WorkerSpiFold");
	require_no_recovery();
	slot = find_and_lock_worker(fcinfo);
	if (!slot)
		PG_RETURN_BOOL(false);

	if (slot == MySlot)
	{
		/* A trigger that its own fold has fired would wait for ever. */
		LWLockRelease(Shared->lock);
		ereport(ERROR,
				(errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
				 errmsg("worker with index %d cannot wait for itself",
						PG_GETARG_INT32(0))));
	}

	generation = slot->generation;
	ticket = ++slot->fold_requested;
	starts = Max(slot->starts, 1);	/* the first process may yet come */
	if (slot->latch)
		SetLatch(slot->latch);
	LWLockRelease(Shared->lock);

	if (!PG_GETARG_BOOL(2))
		PG_RETURN_BOOL(true);

	/* On the list before the first look, or the broadcast might be missed. */
	ConditionVariablePrepareToSleep(&slot->changed);
	for (;;)
	{
		bool		failed;

		LWLockAcquire(Shared->lock, LW_SHARED);
		gone = slot->generation != generation;
		served = !gone && slot->fold_ok >= ticket;
		failed = !gone && slot->fold_done >= ticket;
		error = slot->last_error;
		if (slot->starts > starts || (slot->starts == starts && slot->pid == 0))
			gone = true;
		LWLockRelease(Shared->lock);

		if (served || failed || gone)
			break;
		ConditionVariableSleep(&slot->changed, wait_event);
	}
	ConditionVariableCancelSleep();

	if (!served && !gone)
		raise_worker_error(&error, PG_GETARG_INT32(0));
	if (!served)
		ereport(ERROR,
				(errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
				 errmsg("worker with index %d is not running",
						PG_GETARG_INT32(0)),
				 errhint("Unless it was stopped or has left for good, the server starts it again within %d seconds; worker_spi_workers shows its last error.",
						 worker_spi_restart_interval)));
	PG_RETURN_BOOL(true);
}

/*
 * worker_spi_stop(index int4, dboid oid) RETURNS bool
 *
 * End a worker and return when its process has exited.  The slot is told first
 * and the process is then cancelled: wherever it waits or works, it comes back
 * to its loop, sees that it is to stop, and exits with code 0.
 *
 * Returns false if there is no such worker.  Errors: 22023, 3D000, 42501,
 * 55000 without shared memory.
 */
Datum
worker_spi_stop(PG_FUNCTION_ARGS)
{
	WorkerSlot *slot;
	uint64		generation;
	pid_t		pid;
	const char *type;
	bool		insist = false;

	check_nargs(fcinfo, 2);
	slot = find_and_lock_worker(fcinfo);
	if (!slot)
		PG_RETURN_BOOL(false);

	generation = slot->generation;
	pid = slot->pid;
	slot->stop = true;
	if (pid != 0)
		kill(pid, SIGINT);		/* its exit callback would need our lock */
	else if (!slot->launcher)
		free_slot(slot);		/* the next process finds it gone, and exits */
	LWLockRelease(Shared->lock);
	ConditionVariableBroadcast(&slot->changed);

	/*
	 * A trigger can swallow the cancel, but not a termination; with the slot
	 * told to stop, that is no less the end of the worker.
	 */
	ConditionVariablePrepareToSleep(&slot->changed);
	for (;;)
	{
		bool		gone;

		LWLockAcquire(Shared->lock, LW_EXCLUSIVE);
		gone = slot->generation != generation;
		if (!gone && insist && slot->pid != 0)
			kill(slot->pid, SIGTERM);
		LWLockRelease(Shared->lock);
		if (gone)
			break;
		insist = ConditionVariableTimedSleep(&slot->changed, 1000,
											 WAIT_EVENT_BGWORKER_SHUTDOWN);
	}
	ConditionVariableCancelSleep();

	/*
	 * The slot was freed by the exit callback; the process ends a moment
	 * later.  The postmaster tells that to nobody but the launcher.
	 */
	while (pid != 0 && (type = GetBackgroundWorkerTypeByPid(pid)) != NULL &&
		   strncmp(type, "worker_spi", strlen("worker_spi")) == 0)
	{
		(void) WaitLatch(MyLatch,
						 WL_LATCH_SET | WL_TIMEOUT | WL_EXIT_ON_PM_DEATH,
						 5, WAIT_EVENT_BGWORKER_SHUTDOWN);
		ResetLatch(MyLatch);
		CHECK_FOR_INTERRUPTS();
	}
	PG_RETURN_BOOL(true);
}

/* Wake the workers for which the committed transaction had deltas. */
static void
wake_workers(void)
{
	ListCell   *lc;

	LWLockAcquire(Shared->lock, LW_SHARED);
	foreach(lc, pending_wakes)
	{
		PendingWake *pending = lfirst(lc);
		WorkerSlot *slot = find_slot(pending->index, MyDatabaseId, InvalidOid);

		/* If it was set already, the worker knows and has yet to fold. */
		if (slot && slot->latch &&
			pg_atomic_exchange_u32(&slot->wake, 1) == 0)
			SetLatch(slot->latch);
	}
	LWLockRelease(Shared->lock);
}

/*
 * At the end of a transaction: at XACT_EVENT_COMMIT its rows have just become
 * visible to everybody.  A prepared transaction will be committed by somebody
 * else; its deltas wait for the next nap to end.
 */
static void
wake_at_commit(XactEvent event, void *arg)
{
	if (event == XACT_EVENT_COMMIT && pending_wakes != NIL)
		wake_workers();
	if (event == XACT_EVENT_COMMIT || event == XACT_EVENT_ABORT ||
		event == XACT_EVENT_PREPARE)
		pending_wakes = NIL;	/* its memory ends with the transaction */
}

/* What a subtransaction asked for becomes its parent's, or is forgotten. */
static void
forget_wakes_at_rollback(SubXactEvent event, SubTransactionId mySubid,
						 SubTransactionId parentSubid, void *arg)
{
	int			level = GetCurrentTransactionNestLevel();
	ListCell   *lc;

	foreach(lc, pending_wakes)
	{
		PendingWake *pending = lfirst(lc);

		if (pending->nestlevel < level)
			continue;
		if (event == SUBXACT_EVENT_COMMIT_SUB)
			pending->nestlevel = level - 1;
		else if (event == SUBXACT_EVENT_ABORT_SUB)
			pending_wakes = foreach_delete_current(pending_wakes, lc);
	}
}

/*
 * worker_spi_wake() RETURNS trigger
 *
 * For an AFTER INSERT ... FOR EACH STATEMENT trigger on schemaN.counted: have
 * worker N fold soon after the current transaction commits.  Does nothing if
 * there is no such worker then.
 *
 * Errors: 39P01 if not called by such a trigger on such a table.
 */
Datum
worker_spi_wake(PG_FUNCTION_ARGS)
{
	static bool registered = false;
	TriggerData *trigdata = (TriggerData *) fcinfo->context;
	char	   *schema;
	char		expected[NAMEDATALEN];
	int			index;
	ListCell   *lc;
	MemoryContext old_context;
	PendingWake *pending;

	if (!CALLED_AS_TRIGGER(fcinfo))
		ereport(ERROR,
				(errcode(ERRCODE_E_R_I_E_TRIGGER_PROTOCOL_VIOLATED),
				 errmsg("function \"%s\" was not called by trigger manager",
						"worker_spi_wake")));

	/* As a BEFORE trigger it would return no row, and so throw it away. */
	if (!TRIGGER_FIRED_AFTER(trigdata->tg_event) ||
		!TRIGGER_FIRED_BY_INSERT(trigdata->tg_event))
		ereport(ERROR,
				(errcode(ERRCODE_E_R_I_E_TRIGGER_PROTOCOL_VIOLATED),
				 errmsg("function \"%s\" must be fired AFTER INSERT",
						"worker_spi_wake")));

	schema = get_namespace_name(RelationGetNamespace(trigdata->tg_relation));
	index = schema && strncmp(schema, "schema", 6) == 0 ? atoi(schema + 6) : -1;
	snprintf(expected, sizeof(expected), "schema%d", index);
	if (index < 0 || strcmp(schema, expected) != 0 ||
		strcmp(RelationGetRelationName(trigdata->tg_relation), "counted") != 0)
		ereport(ERROR,
				(errcode(ERRCODE_E_R_I_E_TRIGGER_PROTOCOL_VIOLATED),
				 errmsg("trigger \"%s\" is on a table that no worker folds",
						trigdata->tg_trigger->tgname),
				 errhint("A worker with index N folds the table \"schemaN.counted\".")));

	/* A worker that inserts a total fires it too, and need not wake itself. */
	if (!Shared || (MySlot && MySlot->params.index == index))
		return PointerGetDatum(NULL);

	if (!registered)
	{
		RegisterXactCallback(wake_at_commit, NULL);
		RegisterSubXactCallback(forget_wakes_at_rollback, NULL);
		registered = true;
	}

	foreach(lc, pending_wakes)
	{
		if (((PendingWake *) lfirst(lc))->index == index)
			return PointerGetDatum(NULL);
	}

	old_context = MemoryContextSwitchTo(TopTransactionContext);
	pending = palloc(sizeof(PendingWake));
	pending->index = index;
	pending->nestlevel = GetCurrentTransactionNestLevel();
	pending_wakes = lappend(pending_wakes, pending);
	MemoryContextSwitchTo(old_context);

	return PointerGetDatum(NULL);
}

/* A time for the view, or NULL if it is not known. */
static Datum
time_or_null(TimestampTz time, bool *isnull)
{
	*isnull = time == 0;
	return TimestampTzGetDatum(time);
}

/*
 * worker_spi_get_workers() RETURNS SETOF record
 *
 * The rows of the view worker_spi_workers, with OIDs instead of names.
 *
 * Errors: 55000 without shared memory.
 */
Datum
worker_spi_get_workers(PG_FUNCTION_ARGS)
{
#define WORKERS_COLUMNS 17
	ReturnSetInfo *rsinfo = (ReturnSetInfo *) fcinfo->resultinfo;
	Oid			static_dboid;
	Oid			static_roleoid;

	check_nargs(fcinfo, 0);
	require_shared_memory();
	InitMaterializedSRF(fcinfo, 0);
	static_dboid = resolve_database(InvalidOid, true);
	static_roleoid = static_role();

	for (int i = 0; i < Shared->nslots; i++)
	{
		WorkerSlot	slot;
		Datum		values[WORKERS_COLUMNS];
		bool		nulls[WORKERS_COLUMNS] = {0};
		int			n = 0;

		LWLockAcquire(Shared->lock, LW_SHARED);
		slot = Shared->slots[i];
		LWLockRelease(Shared->lock);
		if (slot.generation == 0)
			continue;

		values[n++] = Int32GetDatum(slot.params.index);
		values[n++] = CStringGetTextDatum(slot.params.is_static ?
										  "static" : "dynamic");
		values[n++] = ObjectIdGetDatum(OidIsValid(slot.dboid) ?
									   slot.dboid : static_dboid);
		values[n++] = ObjectIdGetDatum(OidIsValid(slot.roleoid) ?
									   slot.roleoid : static_roleoid);
		nulls[n] = slot.pid == 0;
		values[n++] = Int32GetDatum(slot.pid);
		values[n++] = CStringGetTextDatum(state_names[slot.state]);
		values[n] = time_or_null(slot.worker_start, &nulls[n]);
		n++;
		values[n++] = Int64GetDatum(slot.fold_count);
		values[n++] = Int64GetDatum(slot.folded_rows);
		values[n] = time_or_null(slot.last_fold_time, &nulls[n]);
		n++;
		nulls[n] = slot.last_fold_time == 0;
		values[n++] = Float8GetDatum(slot.last_fold_ms);
		values[n++] = Int64GetDatum(slot.failed_count);
		values[n] = time_or_null(slot.last_failed_time, &nulls[n]);
		n++;
		nulls[n] = nulls[n + 1] = slot.last_error.sqlstate == 0;
		values[n++] = CStringGetTextDatum(readable_text(slot.last_error.message));
		values[n++] = CStringGetTextDatum(unpack_sql_state(slot.last_error.sqlstate));
		values[n] = time_or_null(slot.next_fold_time, &nulls[n]);
		n++;
		values[n++] = Int64GetDatum(Max(slot.starts - 1, 0));
		tuplestore_putvalues(rsinfo->setResult, rsinfo->setDesc,
							 values, nulls);
	}
	return (Datum) 0;
}
