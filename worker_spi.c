/* -------------------------------------------------------------------------
 *
 * worker_spi.c
 *		Background workers that fold the deltas of a counter into its total:
 *		the module as the server and the user see it.
 *
 * An UPDATE of one hot row by many clients queues up on the row's lock;
 * INSERTs do not.  So clients insert deltas into schemaN.counted, and a
 * background worker, number N, adds them to the totals in a child of that
 * table every now and then, deleting them in the same transaction.  At every
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
 *		The postmaster hands a worker what it must know in bgw_extra, by
 *		value: a pointer would mean nothing in another process.  Everything
 *		else that processes tell each other goes through slot.c.
 *
 * In this file: the settings, the registration of the static workers, and the
 * SQL functions.  worker_spi.h says what is in the others.
 *
 * Copyright (c) 2026, worker_spi contributors
 *
 * -------------------------------------------------------------------------
 */

#include "postgres.h"

#include "access/xlog.h"
#include "catalog/pg_authid.h"
#include "catalog/pg_database.h"
#include "catalog/pg_type.h"
#include "commands/dbcommands.h"
#include "fmgr.h"
#include "funcapi.h"
#include "mb/pg_wchar.h"
#include "miscadmin.h"
#include "pgstat.h"
#include "storage/ipc.h"
#include "utils/array.h"
#include "utils/builtins.h"
#include "utils/fmgrprotos.h"
#include "utils/guc.h"
#include "utils/lsyscache.h"
#include "utils/syscache.h"
#include "worker_spi.h"

#define WORKER_SPI_VERSION "1.0"

#ifdef PG_MODULE_MAGIC_EXT		/* 18: pg_get_loaded_modules() shows these */
PG_MODULE_MAGIC_EXT(
					.name = "worker_spi",
					.version = WORKER_SPI_VERSION
);
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
	SlotRef		ref;
} Launch;

/* How often a launcher looks whether the worker waits for a lock. */
#define LAUNCH_POLL_MS		100

#define COMMIT_HINT \
	"If this transaction has changed the worker's table, schema or database, commit it first."

/* How often somebody who waits for a cycle looks for the same. */
#define RUN_POLL_MS			1000

/* -------------------------------------------------------------------------
 * State
 * -------------------------------------------------------------------------
 */

/* Names of the states, for the view; in the order of WorkerState. */
static const char *const state_names[] = {
	"starting", "idle", "busy", "backoff", "down", "stopped"
};

/* Settings. */
int			worker_spi_naptime = 10;
static int	worker_spi_total_workers = 2;
char	   *worker_spi_database = NULL;
char	   *worker_spi_role = NULL;
int			worker_spi_restart_interval = 5;

/* only counters: begin */
bool		worker_spi_log_folds = true;
int			worker_spi_wake_delay = 50;
bool		worker_spi_notify = false;

/* only counters: end */

/* In the postmaster: how many databases have static workers. */
static int	num_databases = 0;

PG_FUNCTION_INFO_V1(worker_spi_launch);
PG_FUNCTION_INFO_V1(worker_spi_run);
PG_FUNCTION_INFO_V1(worker_spi_stop);
PG_FUNCTION_INFO_V1(worker_spi_get_workers);

void		_PG_init(void);

static void define_settings(void);
static void define_start_settings(void);
static void register_static_workers(void);
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
	define_settings();
	if (process_shared_preload_libraries_in_progress)
		define_start_settings();

	/* A misspelt worker_spi.something is refused instead of ignored. */
	MarkGUCPrefixReserved("worker_spi");

	/*
	 * pg_upgrade starts both clusters with their libraries loaded.  A worker
	 * would write into one of them, or hold the connection that pg_upgrade
	 * must not find.
	 */
	if (process_shared_preload_libraries_in_progress && !IsBinaryUpgrade)
		register_static_workers();
}

/*
 * The databases become names of objects; a list that cannot be read is refused
 * when it is set.  At server start there is no value to fall back on but the
 * default, in which nobody wants a worker: there _PG_init() looks at it.
 */
static bool
check_database(char **newval, void **extra, GucSource source)
{
	List	   *names;
	const char *problem;

	if (process_shared_preload_libraries_in_progress)
		return true;

	problem = slot_parse_list(*newval, &names);
	list_free_deep(names);
	if (problem)
		GUC_check_errdetail("%s", problem);
	return problem == NULL;
}

/* Tell, once for a reload, that there are too few workers for the list. */
static void
assign_database(const char *newval, void *extra)
{
	List	   *names;

	if (num_databases == 0 || IsUnderPostmaster ||
		strcmp(newval, worker_spi_database) == 0)
		return;
	(void) slot_parse_list(newval, &names);
	if (list_length(names) > num_databases)
		ereport(WARNING,
				(errmsg("parameter \"worker_spi.database\" names %d databases, but the server was started with static workers for %d; the rest takes effect at the next server start",
						list_length(names), num_databases)));
	list_free_deep(names);
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

static void
define_settings(void)
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
							   "Sets the databases of the static workers.",
							   "A comma-separated list; each has worker_spi.total_workers of them.",
							   &worker_spi_database,
							   "postgres",
							   PGC_SIGHUP,
							   0,
							   check_database, assign_database, NULL);

	DefineCustomStringVariable("worker_spi.role",
							   "Sets the role of the static workers.",
							   "If empty, it is the bootstrap superuser.",
							   &worker_spi_role,
							   "",
							   PGC_SIGHUP,
							   0,
							   check_role, NULL, NULL);

	/* only counters: begin */
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
	/* only counters: end */
}

/*
 * These take effect at server start only.  Not without preload: a variable of
 * that kind that is defined later is a fatal error for the session.
 */
static void
define_start_settings(void)
{
	DefineCustomIntVariable("worker_spi.total_workers",
							"Sets the number of static workers in each database.",
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

/*
 * Register total_workers static workers for each database of the list, as far
 * as the server has room for them.
 */
static void
register_static_workers(void)
{
	List	   *databases;
	ListCell   *lc;
	const char *problem = slot_parse_list(worker_spi_database, &databases);
	int			wanted = list_length(databases) * worker_spi_total_workers;
	int			room = max_worker_processes;
	WorkerParams *params = palloc0(Max(wanted, 1) * sizeof(WorkerParams));
	registered_iter iter;
	int			n = 0;

	if (problem && !IsUnderPostmaster)
		ereport(LOG,
				(errmsg("worker_spi starts no static worker: invalid value for parameter \"worker_spi.database\": \"%s\"",
						worker_spi_database)));

	/* The server would refuse each of those that are too many, one by one. */
	registered_foreach(iter)
		room--;
	if (wanted > room && !IsUnderPostmaster)
		ereport(WARNING,
				(errmsg("worker_spi starts only %d of %d static workers: \"max_worker_processes\" is %d and must be at least %d",
						Max(room, 0), wanted, max_worker_processes,
						max_worker_processes - room + wanted)));

	foreach(lc, databases)
	{
		for (int i = 1; i <= worker_spi_total_workers && n < room; i++)
		{
			BackgroundWorker worker;

			params[n].generation = n + 1;
			params[n].index = i;
			params[n].is_static = true;
			namestrcpy(&params[n].database, lfirst(lc));
			fill_worker(&worker, &params[n], n, 0);
			RegisterBackgroundWorker(&worker);
			n++;
		}
	}
	num_databases = list_length(databases);
	slot_init(n, params);
	pfree(params);
	list_free_deep(databases);
}

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

	/* A static worker so marked would be unregistered, and never return. */
	if (params->interruptible)
		worker->bgw_flags |= BGWORKER_INTERRUPTIBLE;

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
 * SQL functions: what they have in common
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
	if (!slot_have_memory())
		ereport(ERROR,
				(errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
				 errmsg("worker_spi must be loaded via \"shared_preload_libraries\""),
				 errhint("Add worker_spi to \"shared_preload_libraries\" and restart the server.")));
}

/*
 * A worker starts when recovery has ended, and nobody can wait that long; and
 * it is the postmaster that starts it.
 */
static void
require_postmaster(void)
{
	if (!IsUnderPostmaster)
		ereport(ERROR,
				(errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
				 errmsg("background workers do not run in single-user mode")));
	if (RecoveryInProgress())
		ereport(ERROR,
				(errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
				 errmsg("recovery is in progress"),
				 errhint("Workers run on the primary server only.")));
}

/* The database that a caller means by dboid: with 0, its own. */
static Oid
resolve_database(Oid dboid)
{
	if (!OidIsValid(dboid))
		return MyDatabaseId;

	if (!SearchSysCacheExists1(DATABASEOID, ObjectIdGetDatum(dboid)))
		ereport(ERROR,
				(errcode(ERRCODE_UNDEFINED_DATABASE),
				 errmsg("database with OID %u does not exist", dboid)));
	return dboid;
}

/* The role that a worker has when it is connected. */
static Oid
params_role(const WorkerParams *params)
{
	if (!params->is_static)
		return params->roleoid;
	return worker_spi_role[0] != '\0' ?
		get_role_oid(worker_spi_role, true) : BOOTSTRAP_SUPERUSERID;
}

/* The role that it has now, or that. */
static Oid
worker_role(const WorkerStatus *status)
{
	return OidIsValid(status->roleoid) ? status->roleoid :
		params_role(&status->params);
}

/*
 * The caller may use a worker's role only as far as SET ROLE would let it; a
 * role that does not exist is a superuser's affair.
 */
static void
check_may_act_as(Oid roleoid)
{
	char	   *name = GetUserNameFromId(roleoid, true);

	if (!can_act_as(GetUserId(), name ? roleoid : BOOTSTRAP_SUPERUSERID))
		ereport(ERROR,
				(errcode(ERRCODE_INSUFFICIENT_PRIVILEGE),
				 errmsg("permission denied for a worker of role \"%s\"",
						name ? name : psprintf("%u", roleoid)),
				 errdetail("Only members of that role may launch and stop its workers, and ask them for work.")));
}

/*
 * Find the worker that the first two arguments name, if there is one, and
 * check that the caller may use it.
 */
static bool
find_worker(FunctionCallInfo fcinfo, SlotRef *ref, Oid *roleoid)
{
	int			index = PG_GETARG_INT32(0);
	Oid			dboid;
	WorkerStatus status;

	check_index(index);
	require_shared_memory();
	dboid = resolve_database(PG_GETARG_OID(1));
	if (!slot_find(index, dboid, get_database_name(dboid), ref) ||
		!slot_get_status(ref->slotno, &status) ||
		status.params.generation != ref->generation)
		return false;
	*roleoid = worker_role(&status);
	check_may_act_as(*roleoid);
	return true;
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

/*
 * Raise an error of a worker, if it is one, as the caller's own.
 *
 * The detail may show rows.  It is for those who could see them: the user of
 * the session, who may not be the one whose function this runs in.
 */
static void
raise_worker_error(WorkerError *error, Oid roleoid, int index)
{
	bool		may_see = OidIsValid(roleoid) &&
		can_act_as(GetSessionUserId(), roleoid);

	if (error->sqlstate != 0)
		ereport(ERROR,
				(errcode(error->sqlstate),
				 errmsg_internal("%s", readable_text(error->message)),
				 error->detail[0] && may_see ?
				 errdetail_internal("%s", readable_text(error->detail)) : 0,
				 error->hint[0] ? errhint("%s", readable_text(error->hint)) : 0,
				 errcontext("worker_spi worker %d", index)));
}

/* -------------------------------------------------------------------------
 * Launching
 * -------------------------------------------------------------------------
 */

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
no_slot_error(void)
{
	ereport(ERROR,
			(errcode(ERRCODE_CONFIGURATION_LIMIT_EXCEEDED),
			 errmsg("no background worker slot is left"),
			 errhint("Consider increasing the configuration parameter \"max_worker_processes\", which is %d.",
					 max_worker_processes)));
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
	slot_unreserve(&launch->ref);
}

/*
 * Does this process wait for a lock that we hold, or that somebody holds who
 * waits for us in the same way?
 */
static bool
waits_for_us(pid_t pid)
{
	List	   *pids = list_make1_int(pid);
	ListCell   *lc;
	bool		found;

	foreach(lc, pids)
	{
		ArrayType  *blockers =
			DatumGetArrayTypeP(DirectFunctionCall1(pg_blocking_pids,
												   Int32GetDatum(lfirst_int(lc))));
		int			n = ArrayGetNItems(ARR_NDIM(blockers), ARR_DIMS(blockers));

		for (int i = 0; i < n; i++)
			pids = list_append_unique_int(pids,
										  ((int32 *) ARR_DATA_PTR(blockers))[i]);
		pfree(blockers);
	}
	found = list_member_int(pids, MyProcPid);
	list_free(pids);
	return found;
}

/*
 * Wait until the worker is in its loop, and return its pid, or 0 if it ended
 * before.  We are woken by the worker, when it is ready, and by the
 * postmaster, when it starts or ends; without shared memory there is only the
 * worker's lock to look at.
 *
 * A worker can be ready before the postmaster has noted its pid.  We wait for
 * that as well: worker_spi_stop() relies on it.
 *
 * A worker that waits for a lock that our own transaction holds, or that is
 * held by one who waits for us, will never be ready, and no deadlock detector
 * knows: we wait for it on a latch.
 */
static pid_t
wait_until_ready(const Launch *launch, const WorkerParams *params)
{
	for (;;)
	{
		pid_t		pid = 0;
		BgwHandleStatus status = GetBackgroundWorkerPid(launch->handle, &pid);

		if (status == BGWH_STOPPED)
			return 0;
		if (status == BGWH_STARTED)
		{
			bool		behind_us = waits_for_us(pid);

			/* Without shared memory, to wait for us is to be ready. */
			if (slot_launched(&launch->ref, params))
				return pid;
			if (behind_us)
				ereport(ERROR,
						(errcode(ERRCODE_LOCK_NOT_AVAILABLE),
						 errmsg("worker with index %d waits for a lock and could not get ready",
								params->index),
						 errhint("%s", COMMIT_HINT)));
		}

		(void) WaitLatch(MyLatch,
						 WL_LATCH_SET | WL_TIMEOUT | WL_EXIT_ON_PM_DEATH,
						 slot_have_memory() ? LAUNCH_POLL_MS : LAUNCH_POLL_MS / 10,
						 WAIT_EVENT_BGWORKER_STARTUP);
		ResetLatch(MyLatch);
		CHECK_FOR_INTERRUPTS();
	}
}

/*
 * Fill in params from the arguments of worker_spi_launch(), and check that the
 * caller may have such a worker.  Returns the database, and its name.
 */
static Oid
check_launch(FunctionCallInfo fcinfo, WorkerParams *params,
			 const char **dbname)
{
	Oid			dboid;
	SlotRef		ref;
	WorkerStatus status;

	check_nargs(fcinfo, 5);
	memset(params, 0, sizeof(*params));
	params->index = PG_GETARG_INT32(0);
	check_index(params->index);
	params->connflags = parse_flags(PG_GETARG_ARRAYTYPE_P(3));
	params->dboid = dboid = resolve_database(PG_GETARG_OID(1));
	params->roleoid = resolve_role(PG_GETARG_OID(2));
	params->interruptible = PG_GETARG_BOOL(4);
	*dbname = get_database_name(dboid);

	if (params->connflags != 0 && !superuser())
		ereport(ERROR,
				(errcode(ERRCODE_INSUFFICIENT_PRIVILEGE),
				 errmsg("permission denied to use flags"),
				 errdetail("Only a superuser may bypass the checks on connections.")));

	/* A static worker that was stopped starts again as what it was. */
	if (slot_have_memory() &&
		slot_find(params->index, dboid, *dbname, &ref) &&
		slot_get_status(ref.slotno, &status) &&
		status.state == WORKER_STOPPED)
	{
		if (OidIsValid(PG_GETARG_OID(2)) || params->connflags != 0 ||
			params->interruptible)
			ereport(ERROR,
					(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
					 errmsg("worker with index %d is a static worker that was stopped",
							params->index),
					 errhint("Leave roleoid, flags and interruptible at their defaults to start it again.")));
		*params = status.params;
		check_may_act_as(worker_role(&status));
	}
	else
		check_may_act_as(params->roleoid);
	if (database_aclcheck(dboid, GetUserId(), ACL_CONNECT) != ACLCHECK_OK)
		aclcheck_error(ACLCHECK_NO_PRIV, OBJECT_DATABASE, *dbname);
	require_postmaster();
	return dboid;
}

/* The worker is gone: raise the error of which it died. */
static void
launch_error(const Launch *launch, const BackgroundWorker *worker,
			 const WorkerParams *params)
{
	int			index = params->index;
	WorkerError error;

	if (slot_launch_error(&launch->ref, &error))
		ereport(ERROR,
				(errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
				 errmsg("worker with index %d was stopped before it was ready",
						index)));
	if (error.sqlstate == ERRCODE_LOCK_NOT_AVAILABLE)
		strlcpy(error.hint, COMMIT_HINT, sizeof(error.hint));
	raise_worker_error(&error, params_role(params), index);
	ereport(ERROR,
			(errcode(ERRCODE_INSUFFICIENT_RESOURCES),
			 errmsg("could not start %s", worker->bgw_name),
			 errhint("More details may be available in the server log.")));
}

/*
 * worker_spi_launch(index int4, dboid oid, roleoid oid, flags text[],
 *					 interruptible bool) RETURNS int4
 *
 * Start a dynamic worker, or a static one that was stopped, and return its
 * pid.  With shared memory that is when it is in its loop and its table
 * exists; an error that keeps it from getting there is raised here, and
 * nothing is left behind.  Without, it is when the process has started.
 *
 * Errors: 22023 for a negative index, wrong flags, or other arguments for a
 * static worker; 3D000, 42704, 42501; 42710 if there is such a worker; 53400
 * if there is no slot; 55P03 if the caller's own locks are in the way; and
 * whatever the worker dies of.
 */
Datum
worker_spi_launch(PG_FUNCTION_ARGS)
{
	WorkerParams params;
	Oid			dboid;
	const char *dbname;
	BackgroundWorker worker;
	Launch		launch = {0};
	ReserveResult reserved;
	pid_t		pid;

	dboid = check_launch(fcinfo, &params, &dbname);
	injection_point("worker-spi-checked");
	reserved = slot_reserve(&params, dboid, dbname, &launch.ref);
	if (reserved == RESERVE_DUPLICATE)
		ereport(ERROR,
				(errcode(ERRCODE_DUPLICATE_OBJECT),
				 errmsg("a worker with index %d already runs in that database",
						params.index)));
	if (reserved == RESERVE_FULL)
		no_slot_error();

	/* A terminated caller skips PG_CATCH, so this must be an exit callback. */
	PG_ENSURE_ERROR_CLEANUP(undo_launch, PointerGetDatum(&launch));
	{
		fill_worker(&worker, &params, launch.ref.slotno, MyProcPid);
		if (!RegisterDynamicBackgroundWorker(&worker, &launch.handle))
			no_slot_error();
		pid = wait_until_ready(&launch, &params);
		if (pid == 0)
			launch_error(&launch, &worker, &params);
	}
	PG_END_ENSURE_ERROR_CLEANUP(undo_launch, PointerGetDatum(&launch));
	PG_RETURN_INT32(pid);
}

/* -------------------------------------------------------------------------
 * Running and stopping
 * -------------------------------------------------------------------------
 */

/*
 * A worker that is connecting while our own transaction holds its database
 * will never answer, and no deadlock detector knows: we wait for it on a
 * condition variable.  (Once connected, it waits for no lock for long.)
 */
static void
check_not_behind_us(const SlotRef *ref, int index)
{
	WorkerStatus status;

	if (slot_get_status(ref->slotno, &status) &&
		status.params.generation == ref->generation &&
		status.state == WORKER_STARTING && status.pid != 0 &&
		waits_for_us(status.pid))
		ereport(ERROR,
				(errcode(ERRCODE_LOCK_NOT_AVAILABLE),
				 errmsg("worker with index %d waits for a lock that this transaction holds",
						index),
				 errhint("Commit first.")));
}

/* Say that there is no such worker, as pg_terminate_backend() would. */
static Datum
warn_of_nobody(FunctionCallInfo fcinfo)
{
	ereport(WARNING,
			(errmsg("there is no worker with index %d in database \"%s\"",
					PG_GETARG_INT32(0),
					get_database_name(resolve_database(PG_GETARG_OID(1))))));
	return BoolGetDatum(false);
}

/*
 * worker_spi_run(index int4, dboid oid, wait bool) RETURNS bool
 *
 * Have a worker run a cycle now.  With wait, return when all that was
 * committed before the call is done; slot.c says how that works.
 *
 * Returns false, with a warning, if there is no such worker.  Errors: 22023,
 * 3D000, 42501; 55000 without shared memory, during recovery, in single-user
 * mode, in a worker, or if the worker has no process; 55P03 if the caller's
 * own locks are in the way; and that of the cycle if it failed, or left
 * something over.
 */
Datum
worker_spi_run(PG_FUNCTION_ARGS)
{
	static uint32 wait_event = 0;
	int			index;
	SlotRef		ref;
	Oid			roleoid;
	uint64		ticket;
	SlotAnswer	answer = ANSWER_PENDING;
	WorkerError error = {0};

	check_nargs(fcinfo, 3);
	index = PG_GETARG_INT32(0);
	require_postmaster();
	if (!find_worker(fcinfo, &ref, &roleoid))
		return warn_of_nobody(fcinfo);

	/* Two workers that wait for each other would do so for ever. */
	if (MyBgworkerEntry &&
		strcmp(MyBgworkerEntry->bgw_library_name, "worker_spi") == 0)
		ereport(ERROR,
				(errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
				 errmsg("a worker of worker_spi cannot wait for a worker")));

	ticket = slot_ask(&ref);
	if (ticket != 0)
	{
		if (wait_event == 0)
			wait_event = define_wait_event("WorkerSpiRun");
		if (!PG_GETARG_BOOL(2))
			PG_RETURN_BOOL(true);
		while ((answer = slot_wait(&ref, ticket, RUN_POLL_MS, wait_event,
								   &error)) == ANSWER_PENDING)
			check_not_behind_us(&ref, index);
		if (answer == ANSWER_WELL)
			PG_RETURN_BOOL(true);
		raise_worker_error(&error, roleoid, index);
	}
	ereport(ERROR,
			(errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
			 errmsg("worker with index %d is not running", index),
			 errhint("The view worker_spi_workers shows its state and last error.  One that is \"down\" is started again, one that is \"stopped\" by worker_spi_launch().")));
	PG_RETURN_NULL();			/* not reached */
}

/*
 * worker_spi_stop(index int4, dboid oid) RETURNS bool
 *
 * End a worker and return when its process has exited.
 *
 * Returns false, with a warning, if there is no such worker, or it is stopped
 * already.  Errors: 22023, 3D000, 42501, 55000 without shared memory.
 */
Datum
worker_spi_stop(PG_FUNCTION_ARGS)
{
	SlotRef		ref;
	Oid			roleoid;
	pid_t		pid;
	const char *type;

	check_nargs(fcinfo, 2);
	if (!find_worker(fcinfo, &ref, &roleoid) || (pid = slot_stop(&ref)) < 0)
		return warn_of_nobody(fcinfo);
	slot_wait_stopped(&ref);

	/*
	 * The exit callback has left the slot; the process ends a moment later.
	 * The postmaster tells that to nobody but the launcher.
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

/* -------------------------------------------------------------------------
 * Showing
 * -------------------------------------------------------------------------
 */

/* A time for the view, or NULL if it is not known. */
static Datum
time_or_null(TimestampTz time, bool *isnull)
{
	*isnull = time == 0;
	return TimestampTzGetDatum(time);
}

/*
 * The columns of worker_spi_get_workers().  A function of another version's SQL
 * script, or of a superuser's, may ask for others, and an address be shown as
 * a number.
 */
static const Oid workers_columns[] = {
	INT4OID, TEXTOID, OIDOID, TEXTOID, OIDOID, INT4OID, TEXTOID,
	TIMESTAMPTZOID, TIMESTAMPTZOID, INT8OID, INT8OID, INT8OID, TIMESTAMPTZOID,
	FLOAT8OID, INT8OID, TIMESTAMPTZOID, TEXTOID, TEXTOID, TIMESTAMPTZOID,
	INT8OID
};

static void
check_row_type(TupleDesc desc)
{
	bool		equal = desc->natts == lengthof(workers_columns);

	for (int i = 0; equal && i < lengthof(workers_columns); i++)
		equal = TupleDescAttr(desc, i)->atttypid == workers_columns[i];
	if (!equal)
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_FUNCTION_DEFINITION),
				 errmsg("function returns other columns than the library expects"),
				 errhint("DROP EXTENSION worker_spi, and CREATE it again.")));
}

/* The row of a worker that is registered. */
static void
put_worker(ReturnSetInfo *rsinfo, WorkerStatus *w)
{
	Datum		values[lengthof(workers_columns)];
	bool		nulls[lengthof(workers_columns)] = {0};
	int			n = 0;

	values[n++] = Int32GetDatum(w->params.index);
	values[n++] = CStringGetTextDatum(w->params.is_static ? "static" : "dynamic");
	values[n++] = ObjectIdGetDatum(OidIsValid(w->dboid) ?
								   w->dboid : w->params.dboid);
	nulls[n] = !w->params.is_static;
	values[n++] = CStringGetTextDatum(readable_text(NameStr(w->params.database)));
	values[n++] = ObjectIdGetDatum(worker_role(w));

	/* One that waits before it connects is as good as not there. */
	nulls[n] = w->pid == 0 || w->state == WORKER_DOWN;
	values[n++] = Int32GetDatum(w->pid);
	values[n++] = CStringGetTextDatum(state_names[w->state]);
	values[n] = time_or_null(w->worker_start, &nulls[n]);
	n++;
	values[n++] = TimestampTzGetDatum(w->done_until);
	values[n++] = Int64GetDatum(w->rows_left);
	values[n++] = Int64GetDatum(w->cycles);
	values[n++] = Int64GetDatum(w->rows_done);
	values[n] = time_or_null(w->last_done_time, &nulls[n]);
	n++;
	nulls[n] = w->last_done_time == 0;
	values[n++] = Float8GetDatum(w->last_done_ms);
	values[n++] = Int64GetDatum(w->failed_count);
	values[n] = time_or_null(w->last_failed_time, &nulls[n]);
	n++;
	nulls[n] = nulls[n + 1] = w->last_error.sqlstate == 0;
	values[n++] = CStringGetTextDatum(readable_text(w->last_error.message));
	values[n++] = CStringGetTextDatum(unpack_sql_state(w->last_error.sqlstate));
	values[n] = time_or_null(w->next_cycle_time, &nulls[n]);
	n++;
	values[n++] = Int64GetDatum(Max(w->starts - 1, 0));
	Assert(n == lengthof(workers_columns));
	tuplestore_putvalues(rsinfo->setResult, rsinfo->setDesc, values, nulls);
}

/*
 * The rows of static workers that the settings ask for and the server has not
 * registered, for want of room at its start, or because their database has
 * joined the list since.
 */
static void
put_missing_workers(ReturnSetInfo *rsinfo)
{
	List	   *names;
	ListCell   *lc;

	/* A malformed list asks for nothing. */
	(void) slot_parse_list(worker_spi_database, &names);
	foreach(lc, names)
	{
		Oid			dboid = get_database_oid(lfirst(lc), true);

		for (int i = 1; i <= worker_spi_total_workers; i++)
		{
			Datum		values[lengthof(workers_columns)] = {0};
			bool		nulls[lengthof(workers_columns)];
			WorkerParams params = {.is_static = true};
			SlotRef		ref;

			if (slot_find(i, dboid, lfirst(lc), &ref))
				continue;
			memset(nulls, true, sizeof(nulls));
			nulls[0] = nulls[1] = nulls[3] = nulls[4] = nulls[6] = false;
			values[0] = Int32GetDatum(i);
			values[1] = CStringGetTextDatum("static");
			values[3] = CStringGetTextDatum(lfirst(lc));
			values[4] = ObjectIdGetDatum(params_role(&params));
			values[6] = CStringGetTextDatum("missing");
			tuplestore_putvalues(rsinfo->setResult, rsinfo->setDesc, values, nulls);
		}
	}
	list_free_deep(names);
}

/*
 * worker_spi_get_workers() RETURNS SETOF record
 *
 * The rows of the view worker_spi_workers, with OIDs instead of names but for
 * the database of a static worker that is not connected.
 *
 * Errors: 55000 without shared memory.
 */
Datum
worker_spi_get_workers(PG_FUNCTION_ARGS)
{
	ReturnSetInfo *rsinfo = (ReturnSetInfo *) fcinfo->resultinfo;

	check_nargs(fcinfo, 0);
	require_shared_memory();
	InitMaterializedSRF(fcinfo, 0);
	check_row_type(rsinfo->setDesc);

	for (int i = 0; i < slot_count(); i++)
	{
		WorkerStatus status;

		if (slot_get_status(i, &status))
			put_worker(rsinfo, &status);
	}
	put_missing_workers(rsinfo);
	return (Datum) 0;
}
