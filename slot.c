/* -------------------------------------------------------------------------
 *
 * slot.c
 *		Shared memory: one slot for each worker, through which backends and
 *		worker processes talk to each other.
 *
 * States
 *		A slot outlives the processes of its worker.  The worker's own process
 *		makes the transitions marked with *, the rest are made for it while it
 *		has no process.
 *
 *			(free)		-- server start ------------------> DOWN
 *			(free)		-- launch ------------------------> STARTING
 *			STOPPED		-- launch ------------------------> STARTING
 *			DOWN		-- process is about to connect --*> STARTING
 *			STARTING	-- what it works on is there ----*> BUSY
 *			STARTING	-- starts afresh, after failures *> BACKOFF
 *			BUSY		-- cycle went through -----------*> IDLE
 *			BUSY, STARTING -- cycle failed --------------*> BACKOFF
 *			IDLE, BACKOFF -- due, or asked for ----------*> BUSY
 *			any			-- process exits, to come again -*> DOWN
 *			any			-- process exits for good -------*> (free) or STOPPED
 *			DOWN		-- stop --------------------------> (free) or STOPPED
 *			STARTING	-- launch failed -----------------> (free) or STOPPED
 *
 *		"(free) or STOPPED": a static worker keeps its slot, so that the view
 *		shows it and it can be launched again.
 *
 *		A slot may be freed, and taken by another worker, while a process of
 *		the first is yet to come or a backend still looks at it.  So whoever
 *		comes back to a slot compares its generation, which is new for each
 *		registration.
 *
 *		A process that dies without running its exit callback takes all of
 *		shared memory with it: the postmaster then ends every process and
 *		calls startup_shmem() again.
 *
 * Asking for a cycle
 *		The algorithm is as follows:
 *		1. A backend takes a ticket: it increments "asked" and sets the
 *		   worker's latch.
 *		2. The worker, at the beginning of a cycle and before its first
 *		   snapshot, notes the value of "asked".  So the cycle sees everything
 *		   that was committed before any of these tickets was taken.
 *		3. At the end of the cycle, the worker sets "answered" to that value
 *		   and, if the cycle went well, "answered_well" too; if not, it leaves
 *		   the error.  Then it wakes all who wait.
 *		4. When the process exits, it answers all tickets, none of them well.
 *		5. The backend waits until "answered" has reached its ticket.  If
 *		   "answered_well" has too, all is done, even if another cycle failed
 *		   meanwhile; if not, the error is its error.
 *
 * Locking
 *		One LWLock guards all slots, and is taken in this file only.  It is
 *		held to copy a few fields, never while anything can raise an error,
 *		wait or run SQL.  Latches are set, and signals sent, while it is held:
 *		a process clears its latch and pid under the same lock before it
 *		exits, so neither can belong to another process by then.
 *
 * Without shared_preload_libraries
 *		there is no shared memory, and a worker keeps a slot for itself.  In
 *		its stead, a heavyweight lock tells the workers of a database apart.
 *
 * Copyright (c) 2026, worker_spi contributors
 *
 * -------------------------------------------------------------------------
 */

#include "postgres.h"

#include <signal.h>

#include "miscadmin.h"
#include "pgstat.h"
#include "storage/condition_variable.h"
#include "storage/ipc.h"
#include "storage/lwlock.h"
#include "storage/shmem.h"
#include "utils/builtins.h"
#include "utils/memutils.h"
#include "utils/varlena.h"
#include "worker_spi.h"

/* -------------------------------------------------------------------------
 * Types
 * -------------------------------------------------------------------------
 */

typedef struct WorkerSlot
{
	WorkerStatus status;		/* what others may see; generation 0 if free */
	Latch	   *latch;			/* the process's, if there is one */
	Latch	   *launcher;		/* the backend's, while launching */
	bool		launching;		/* does a backend wait for readiness? */
	bool		stop;			/* is the worker to leave for good? */
	bool		may_make;		/* may it make what it works on? */

	/* what one process leaves to the next */
	int			connect_failures;	/* in a row */
	int			failures;		/* cycles that failed in a row */
	TimestampTz due;			/* the next cycle, if they are not 0 */
	TimestampTz afresh;			/* when a process last started afresh */

	uint64		asked;			/* last ticket handed out */
	uint64		answered;		/* last ticket answered, well or not */
	uint64		answered_well;	/* last ticket answered well */
	WorkerError answer;			/* why the last was not; 0 if it has exited */

	/* what follows outlasts the registration: somebody may still look at it */
	ConditionVariable changed;	/* broadcast with answers, and at exit */

	/* only counters: begin */
	pg_atomic_uint32 wake;		/* a commit wants a cycle soon */
	/* only counters: end */
} WorkerSlot;

typedef struct SharedSlots
{
	LWLock	   *lock;			/* guards all that follows */
	uint64		last_generation;	/* of the newest registration */
	uint64		changes;		/* counts whatever find_slot() may notice */
	int			nslots;
	WorkerSlot	slots[FLEXIBLE_ARRAY_MEMBER];
} SharedSlots;

/* -------------------------------------------------------------------------
 * State
 * -------------------------------------------------------------------------
 */

/* Shared memory; NULL when the library is not preloaded. */
static SharedSlots *Slots = NULL;

/* In the postmaster: the static workers, of which number i has slot i. */
static int	num_static = 0;
static WorkerParams *static_params = NULL;

static shmem_request_hook_type prev_shmem_request_hook = NULL;
static shmem_startup_hook_type prev_shmem_startup_hook = NULL;

/* In a worker: its slot, and what it does there. */
static WorkerSlot *MySlot = NULL;
static uint64 serving = 0;		/* last ticket that the cycle will answer */
static int64 rows_in_cycle = 0; /* what the cycle has done so far */

static void request_shmem(void);
static void startup_shmem(void);
static ListResult follow_list(WorkerSlot *slot, const char *setting);
static void leave_slot(WorkerSlot *slot);
static WorkerSlot *locked_slot(const SlotRef *ref);

/* -------------------------------------------------------------------------
 * Shared memory
 * -------------------------------------------------------------------------
 */

/*
 * Have shared memory made, with slots for these static workers and for as many
 * dynamic ones as the server can have.
 *
 * Where each process loads the library anew, all of them must come to the same
 * size.  So it goes by max_worker_processes alone, of which there cannot be
 * more static workers either; the settings may have changed since.
 *
 * Called by the postmaster while it loads the library: memory can be asked for
 * at no other time.
 */
void
slot_init(int nstatic, const WorkerParams *params)
{
	num_static = nstatic;
	static_params = MemoryContextAlloc(TopMemoryContext,
									   Max(nstatic, 1) * sizeof(WorkerParams));
	memcpy(static_params, params, nstatic * sizeof(WorkerParams));

	/* Other libraries want memory too, so each hook calls the one before. */
	prev_shmem_request_hook = shmem_request_hook;
	shmem_request_hook = request_shmem;
	prev_shmem_startup_hook = shmem_startup_hook;
	shmem_startup_hook = startup_shmem;
}

static int
num_slots(void)
{
	return 2 * max_worker_processes;
}

static Size
shmem_size(void)
{
	return add_size(offsetof(SharedSlots, slots),
					mul_size(num_slots(), sizeof(WorkerSlot)));
}

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
occupy_slot(WorkerSlot *slot, const WorkerParams *params, WorkerState state)
{
	memset(slot, 0, offsetof(WorkerSlot, changed));
	slot->status.params = *params;
	slot->status.state = state;
	slot->status.done_until = DT_NOBEGIN;
	if (Slots)
		Slots->changes++;

	/* only counters: begin */
	pg_atomic_write_u32(&slot->wake, 0);
	/* only counters: end */
}

/*
 * Set up shared memory: at server start, and once more after each crash, when
 * all of it is gone.
 *
 * What is registered then is in the postmaster's own list, which survives a
 * crash.  A static worker that is not in it had been stopped.  (One that was
 * stopped while it had no process is in the list until its restart is due.)
 *
 * After a crash nothing is made: what a worker had made, somebody may since
 * have dropped.
 */
static void
startup_shmem(void)
{
	static bool server_start = true;
	bool		found;
	registered_iter iter;

	if (prev_shmem_startup_hook)
		prev_shmem_startup_hook();

	LWLockAcquire(AddinShmemInitLock, LW_EXCLUSIVE);
	Slots = ShmemInitStruct("worker_spi", shmem_size(), &found);
	if (!found)
	{
		memset(Slots, 0, shmem_size());
		Slots->lock = &GetNamedLWLockTranche("worker_spi")->lock;
		Slots->nslots = num_slots();
		Slots->changes = 1;
		Slots->last_generation = num_static;
		for (int i = 0; i < Slots->nslots; i++)
		{
			ConditionVariableInit(&Slots->slots[i].changed);

			/* only counters: begin */
			pg_atomic_init_u32(&Slots->slots[i].wake, 0);
			/* only counters: end */
		}
		for (int i = 0; i < num_static; i++)
			occupy_slot(&Slots->slots[i], &static_params[i], WORKER_STOPPED);

		registered_foreach(iter)
		{
			RegisteredBgWorker *rw = registered_worker(iter);
			WorkerParams params;
			WorkerSlot *slot;

			if (rw->rw_terminate ||
				strcmp(rw->rw_worker.bgw_library_name, "worker_spi") != 0)
				continue;

			memcpy(&params, rw->rw_worker.bgw_extra, sizeof(params));
			slot = &Slots->slots[DatumGetInt32(rw->rw_worker.bgw_main_arg)];

			/* An old registration that lingers may share a newer one's slot. */
			if (params.generation >= slot->status.params.generation)
				occupy_slot(slot, &params, WORKER_DOWN);
			slot->may_make = server_start;
			Slots->last_generation = Max(Slots->last_generation,
										 params.generation);
		}

		/* The registrations do not know where reloads have moved them. */
		for (int i = 0; i < num_static; i++)
			(void) follow_list(&Slots->slots[i], worker_spi_database);
	}
	LWLockRelease(AddinShmemInitLock);
	server_start = false;
}

/* A slot that only its own process uses needs no lock. */
static void
lock_slots(LWLockMode mode)
{
	if (Slots)
		LWLockAcquire(Slots->lock, mode);
}

static void
unlock_slots(void)
{
	if (Slots)
		LWLockRelease(Slots->lock);
}

/*
 * Parse a list of names of databases into *names; the caller frees that with
 * list_free_deep().  Returns NULL, or a sentence that says what is wrong.
 *
 * It is here because a setting's check hook, the postmaster and each static
 * worker must all read the list in the same way.
 */
const char *
slot_parse_list(const char *setting, List **names)
{
	char	   *copy = pstrdup(setting);
	List	   *words;
	ListCell   *lc;
	const char *problem = NULL;

	*names = NIL;
	if (!SplitGUCList(copy, ',', &words))
		problem = "List syntax is invalid.";
	else if (words == NIL)
		problem = "The list cannot be empty.";

	foreach(lc, problem ? NIL : words)
	{
		char	   *word = lfirst(lc);
		ListCell   *other;

		if (word[0] == '\0')
			problem = "The name of a database cannot be empty.";
		else if (strlen(word) >= NAMEDATALEN)
			problem = "The name of a database is too long.";
		foreach(other, *names)
			if (strcmp(lfirst(other), word) == 0)
			problem = "A database is named twice.";
		*names = lappend(*names, pstrdup(word));
	}
	list_free(words);
	pfree(copy);
	if (problem)
	{
		list_free_deep(*names);
		*names = NIL;
	}
	return problem;
}

/* -------------------------------------------------------------------------
 * For backends: looking
 * -------------------------------------------------------------------------
 */

bool
slot_have_memory(void)
{
	return Slots != NULL;
}

int
slot_count(void)
{
	return Slots->nslots;
}

/* Copy what can be seen of a slot; false if the slot is free. */
bool
slot_get_status(int slotno, WorkerStatus *status)
{
	LWLockAcquire(Slots->lock, LW_SHARED);
	*status = Slots->slots[slotno].status;
	LWLockRelease(Slots->lock);
	return status->params.generation != 0;
}

/*
 * Find the slot of a worker by its index and database.  A static worker that
 * is not connected has only the name of its database; dbname may be NULL if
 * the caller knows none.  If a static one is stopped there, and another has
 * its index, the other is meant.  The caller holds the lock.
 */
static WorkerSlot *
find_slot(int index, Oid dboid, const char *dbname)
{
	WorkerSlot *stopped = NULL;

	for (int i = 0; i < Slots->nslots; i++)
	{
		WorkerStatus *status = &Slots->slots[i].status;

		if (status->params.generation == 0 || status->params.index != index)
			continue;
		if (OidIsValid(status->dboid) ? status->dboid == dboid :
			status->params.is_static ?
			dbname && strcmp(NameStr(status->params.database), dbname) == 0 :
			status->params.dboid == dboid)
		{
			if (status->state != WORKER_STOPPED)
				return &Slots->slots[i];
			stopped = &Slots->slots[i];
		}
	}
	return stopped;
}

/* The same for other files: false if there is no such worker. */
bool
slot_find(int index, Oid dboid, const char *dbname, SlotRef *ref)
{
	WorkerSlot *slot;

	LWLockAcquire(Slots->lock, LW_SHARED);
	slot = find_slot(index, dboid, dbname);
	if (slot)
	{
		ref->slotno = slot - Slots->slots;
		ref->generation = slot->status.params.generation;
	}
	LWLockRelease(Slots->lock);
	return slot != NULL;
}

/* -------------------------------------------------------------------------
 * For backends: launching
 * -------------------------------------------------------------------------
 */

/*
 * Without shared memory, a worker holds this lock for life, and its launcher
 * holds it until it sees the worker queue up.  It is none of those that
 * pg_advisory_unlock_all() releases, and no catalog has this OID.
 */
#define LAUNCH_LOCK_CLASS	0x5753
#define SET_LOCKTAG_WORKER(tag, dboid, index) \
	SET_LOCKTAG_OBJECT(tag, dboid, LAUNCH_LOCK_CLASS, index, 0)

/*
 * (free), STOPPED -> STARTING, for a launch by this backend into database
 * dboid, which has that name.
 *
 * A worker is relaunched in its own slot if params says that it is static.
 * Sets *ref, and the generation in *params.
 */
ReserveResult
slot_reserve(WorkerParams *params, Oid dboid, const char *dbname, SlotRef *ref)
{
	WorkerSlot *slot;
	ReserveResult result = RESERVE_OK;

	if (!Slots)
	{
		LOCKTAG		tag;

		ref->slotno = -1;
		ref->generation = 0;
		SET_LOCKTAG_WORKER(tag, dboid, params->index);
		return LockAcquire(&tag, ExclusiveLock, false, true) ==
			LOCKACQUIRE_NOT_AVAIL ? RESERVE_DUPLICATE : RESERVE_OK;
	}

	LWLockAcquire(Slots->lock, LW_EXCLUSIVE);
	slot = find_slot(params->index, dboid, dbname);
	if (params->is_static)
	{
		/* Since the caller saw it stopped, another may have launched it. */
		if (!slot || slot->status.state != WORKER_STOPPED)
			result = RESERVE_DUPLICATE;
	}
	else if (slot)
		result = RESERVE_DUPLICATE;
	else
	{
		for (int i = 0; i < Slots->nslots && !slot; i++)
			if (Slots->slots[i].status.params.generation == 0)
				slot = &Slots->slots[i];
		if (!slot)
			result = RESERVE_FULL;
	}
	if (result == RESERVE_OK)
	{
		params->generation = ++Slots->last_generation;
		if (params->is_static)
		{
			/* its counters go on */
			slot->status.params = *params;
			slot->status.state = WORKER_STARTING;
			slot->answer.sqlstate = 0;
			slot->connect_failures = slot->failures = 0;
			Slots->changes++;
		}
		else
			occupy_slot(slot, params, WORKER_STARTING);
		slot->may_make = true;
		slot->launcher = MyLatch;
		slot->launching = true;
		ref->slotno = slot - Slots->slots;
		ref->generation = params->generation;
	}
	LWLockRelease(Slots->lock);
	return result;
}

/*
 * Is the launched worker ready?  From then on it is on its own: an error no
 * longer ends it, and the launcher need not clean up after it.
 */
bool
slot_launched(const SlotRef *ref, const WorkerParams *params)
{
	WorkerSlot *slot;
	bool		is_ready;

	if (!Slots)
	{
		LOCKTAG		tag;

		SET_LOCKTAG_WORKER(tag, params->dboid, params->index);
		is_ready = LockHasWaiters(&tag, ExclusiveLock, false);
		if (is_ready)
			LockRelease(&tag, ExclusiveLock, false);
		return is_ready;
	}

	slot = locked_slot(ref);
	is_ready = slot && slot->status.pid != 0 &&
		slot->status.state != WORKER_STARTING;
	if (is_ready)
	{
		slot->launching = false;
		slot->launcher = NULL;
	}
	LWLockRelease(Slots->lock);
	return is_ready;
}

/*
 * The error of which a launched worker died; its sqlstate is 0 if it left
 * none.  Returns whether worker_spi_stop() was the end of it.
 */
bool
slot_launch_error(const SlotRef *ref, WorkerError *error)
{
	WorkerSlot *slot;
	bool		stopped = false;

	memset(error, 0, sizeof(*error));
	if (!Slots)
		return false;

	slot = locked_slot(ref);
	if (slot)
	{
		stopped = slot->stop;
		*error = slot->answer;
	}
	LWLockRelease(Slots->lock);
	return stopped;
}

/*
 * STARTING -> (free), STOPPED, after a launch that failed and whose process,
 * if there was one, is gone.
 */
void
slot_unreserve(const SlotRef *ref)
{
	WorkerSlot *slot;

	if (!Slots)
		return;					/* the end of the transaction unlocks */

	slot = locked_slot(ref);
	if (slot && slot->launching)
		leave_slot(slot);
	LWLockRelease(Slots->lock);
	ConditionVariableBroadcast(&Slots->slots[ref->slotno].changed);
}

/*
 * Forget a registration: free its slot, or keep that of a static worker as
 * STOPPED.  The caller holds the lock, and has yet to wake those who wait for
 * the slot to change.
 */
static void
leave_slot(WorkerSlot *slot)
{
	if (slot->status.params.is_static)
		slot->status.state = WORKER_STOPPED;
	else
		slot->status.params.generation = 0;
	slot->status.next_cycle_time = 0;
	slot->launcher = NULL;
	slot->launching = false;
	slot->stop = false;
	slot->answered = slot->asked;
	if (Slots)
		Slots->changes++;
}

/* -------------------------------------------------------------------------
 * For backends: asking and stopping
 * -------------------------------------------------------------------------
 */

/* Take the lock, and return the slot if it is still that of ref, or NULL. */
static WorkerSlot *
locked_slot(const SlotRef *ref)
{
	WorkerSlot *slot = &Slots->slots[ref->slotno];

	LWLockAcquire(Slots->lock, LW_EXCLUSIVE);
	return slot->status.params.generation == ref->generation ? slot : NULL;
}

/* Ask for a cycle.  Returns a ticket, or 0 if nobody is there to serve it. */
uint64
slot_ask(const SlotRef *ref)
{
	WorkerSlot *slot = locked_slot(ref);
	uint64		ticket = 0;

	if (slot && slot->status.state != WORKER_DOWN &&
		slot->status.state != WORKER_STOPPED)
	{
		ticket = ++slot->asked;
		if (slot->latch)
			SetLatch(slot->latch);
	}
	LWLockRelease(Slots->lock);
	return ticket;
}

/*
 * Wait until a ticket is answered, or for so many milliseconds.  If it was not
 * answered well, *error is that of the cycle, or its sqlstate is 0 if the
 * worker has exited.
 */
SlotAnswer
slot_wait(const SlotRef *ref, uint64 ticket, long timeout, uint32 wait_event,
		  WorkerError *error)
{
	WorkerSlot *slot;
	bool		timed_out = false;
	bool		answered;
	bool		well;

	/* On the list before the first look, or the broadcast might be missed. */
	ConditionVariablePrepareToSleep(&Slots->slots[ref->slotno].changed);
	for (;;)
	{
		memset(error, 0, sizeof(*error));
		slot = locked_slot(ref);
		answered = !slot || slot->answered >= ticket;
		well = slot && slot->answered_well >= ticket;
		if (slot && answered)
			*error = slot->answer;
		LWLockRelease(Slots->lock);

		if (answered || timed_out)
			break;
		timed_out = ConditionVariableTimedSleep(&Slots->slots[ref->slotno].changed,
												timeout, wait_event);
	}
	ConditionVariableCancelSleep();
	return well ? ANSWER_WELL : answered ? ANSWER_FAILED : ANSWER_PENDING;
}

/*
 * Tell a worker to leave for good: it is told first and then cancelled, so
 * that wherever it waits or works it comes back to its loop and obeys.
 *
 * DOWN -> (free), STOPPED at once.  Returns the pid of its process, 0 if there
 * is none, or -1 if there was nothing to stop.
 */
pid_t
slot_stop(const SlotRef *ref)
{
	WorkerSlot *slot = locked_slot(ref);
	pid_t		pid = -1;

	if (slot && slot->status.state != WORKER_STOPPED)
	{
		pid = slot->status.pid;
		slot->stop = true;
		if (pid != 0)
			kill(pid, SIGINT);
		else if (!slot->launching)
			leave_slot(slot);	/* the next process finds that, and exits */
	}
	LWLockRelease(Slots->lock);
	if (pid == 0)
		ConditionVariableBroadcast(&Slots->slots[ref->slotno].changed);
	return pid;
}

/*
 * Wait until a worker that was told to stop has left its slot.
 *
 * Code that the worker runs can swallow a cancel, but not a termination; with
 * the slot told to stop, that is no less the end of the worker.
 */
void
slot_wait_stopped(const SlotRef *ref)
{
	bool		insist = false;

	ConditionVariablePrepareToSleep(&Slots->slots[ref->slotno].changed);
	for (;;)
	{
		WorkerSlot *slot = locked_slot(ref);
		bool		gone = !slot || slot->status.state == WORKER_STOPPED;

		if (!gone && insist && slot->status.pid != 0)
			kill(slot->status.pid, SIGTERM);
		LWLockRelease(Slots->lock);
		if (gone)
			break;
		insist = ConditionVariableTimedSleep(&Slots->slots[ref->slotno].changed,
											 1000, WAIT_EVENT_BGWORKER_SHUTDOWN);
	}
	ConditionVariableCancelSleep();
}

/* only counters: begin */

/* -------------------------------------------------------------------------
 * For backends: waking
 * -------------------------------------------------------------------------
 */

/*
 * Have a worker, if it is there and not this process, run a cycle soon.  Called
 * when a transaction has just committed, so it must not fail.
 *
 *		hint	where it was found the last time; all zeroes at first
 */
void
slot_wake(int index, Oid dboid, SlotHint *hint)
{
	WorkerSlot *slot;

	LWLockAcquire(Slots->lock, LW_SHARED);
	if (hint->changes != Slots->changes)
	{
		slot = find_slot(index, dboid, NULL);
		hint->changes = Slots->changes;
		hint->slotno = slot ? slot - Slots->slots : -1;
	}
	slot = hint->slotno >= 0 ? &Slots->slots[hint->slotno] : NULL;

	/* If it was set already, the worker knows and has yet to begin. */
	if (slot && slot != MySlot && slot->latch &&
		pg_atomic_exchange_u32(&slot->wake, 1) == 0)
		SetLatch(slot->latch);
	LWLockRelease(Slots->lock);
}

/* only counters: end */

/* -------------------------------------------------------------------------
 * For the worker itself
 * -------------------------------------------------------------------------
 */

/*
 * Take over the slot of our registration, as it is.  Returns false if it is
 * ours no more: stopped while there was no process.
 *
 * Called with signals blocked; nothing here can fail.
 */
bool
slot_attach(int slotno, const WorkerParams *params)
{
	static WorkerSlot private_slot;
	bool		mine;

	if (!Slots)
	{
		MySlot = &private_slot;
		occupy_slot(MySlot, params, WORKER_STARTING);
		ConditionVariableInit(&MySlot->changed);
		MySlot->launching = MySlot->may_make = true;
	}
	else
		MySlot = &Slots->slots[slotno];

	lock_slots(LW_EXCLUSIVE);
	mine = MySlot->status.params.generation == params->generation &&
		MySlot->status.state != WORKER_STOPPED && !MySlot->stop;
	if (mine)
	{
		Assert(MySlot->status.pid == 0);
		MySlot->status.pid = MyProcPid;
		MySlot->status.starts++;
		MySlot->status.worker_start = GetCurrentTimestamp();
		MySlot->latch = MyLatch;
	}
	unlock_slots();
	return mine;
}

/* How many processes before this one, in a row, could not connect? */
int
slot_connect_failures(void)
{
	int			failures;

	lock_slots(LW_SHARED);
	failures = MySlot->connect_failures;
	unlock_slots();
	return failures;
}

/* DOWN, STARTING -> STARTING: we are about to connect. */
void
slot_starting(void)
{
	lock_slots(LW_EXCLUSIVE);
	MySlot->status.state = WORKER_STARTING;
	unlock_slots();
}

/* The name of the database that a static worker is to connect to. */
const char *
slot_database(void)
{
	return NameStr(MySlot->status.params.database);
}

/*
 * Make the database of a static worker one of a list.  If it is not in the
 * list, it takes the first one there that no worker of its index serves.  The
 * caller holds the lock.
 */
static ListResult
follow_list(WorkerSlot *slot, const char *setting)
{
	List	   *names;
	ListCell   *lc;
	ListResult	result = LIST_LEAVE;

	/* At server start a malformed list may be in force; nobody moves then. */
	if (slot_parse_list(setting, &names) != NULL)
		return LIST_STAY;

	foreach(lc, names)
		if (strcmp(lfirst(lc), NameStr(slot->status.params.database)) == 0)
		result = LIST_STAY;
	foreach(lc, result == LIST_STAY ? NIL : names)
	{
		bool		served = false;

		for (int i = 0; i < Slots->nslots; i++)
		{
			WorkerStatus *other = &Slots->slots[i].status;

			if (other->params.generation != 0 && other->params.is_static &&
				other->params.index == slot->status.params.index &&
				strcmp(NameStr(other->params.database), lfirst(lc)) == 0)
				served = true;
		}
		if (!served)
		{
			namestrcpy(&slot->status.params.database, lfirst(lc));
			result = LIST_MOVE;
			break;
		}
	}
	list_free_deep(names);
	return result;
}

/* The same for ourselves.  Where we move to, what we work on may be made. */
ListResult
slot_follow_list(const char *setting)
{
	ListResult	result;

	LWLockAcquire(Slots->lock, LW_EXCLUSIVE);
	result = follow_list(MySlot, setting);
	if (result == LIST_MOVE)
		MySlot->may_make = true;
	LWLockRelease(Slots->lock);
	return result;
}

/*
 * Say where we are connected, and as whom.  Returns false if another worker of
 * our index serves this database already: a static one that has just moved may
 * find a dynamic one there.
 *
 * Called in a transaction: without shared memory it waits for a lock.
 */
bool
slot_connected(Oid dboid, Oid roleoid)
{
	bool		alone = true;

	if (!Slots)
	{
		LOCKTAG		tag;

		SET_LOCKTAG_WORKER(tag, dboid, MySlot->status.params.index);
		(void) LockAcquire(&tag, ExclusiveLock, true, false);
	}
	else
	{
		LWLockAcquire(Slots->lock, LW_EXCLUSIVE);
		for (int i = 0; i < Slots->nslots; i++)
		{
			WorkerSlot *other = &Slots->slots[i];

			if (other != MySlot && other->status.params.generation != 0 &&
				other->status.params.index == MySlot->status.params.index &&
				other->status.dboid == dboid)
				alone = false;
		}
		if (alone)
		{
			MySlot->status.dboid = dboid;
			MySlot->status.roleoid = roleoid;
			MySlot->connect_failures = 0;
			Slots->changes++;
		}
		LWLockRelease(Slots->lock);
	}
	return alone;
}

/*
 * Stay the only worker of our index in the database, after a transaction may
 * have been aborted.
 *
 * Without shared memory we are that by a session-level lock, and an abort
 * releases such locks like all others.  Whoever launched another worker in
 * between has it take our place.
 */
void
slot_keep(void)
{
	LOCKTAG		tag;

	if (Slots)
		return;

	SET_LOCKTAG_WORKER(tag, MyDatabaseId, MySlot->status.params.index);
	switch (LockAcquire(&tag, ExclusiveLock, true, true))
	{
		case LOCKACQUIRE_NOT_AVAIL:
			ereport(FATAL,
					(errcode(ERRCODE_DUPLICATE_OBJECT),
					 errmsg("a worker with index %d already runs in this database",
							MySlot->status.params.index)));
			break;
		case LOCKACQUIRE_OK:
			break;
		default:
			/* There was no abort; one of us is enough. */
			LockRelease(&tag, ExclusiveLock, true);
	}
}

/*
 * STARTING -> BACKOFF, if the process before us has ended to start afresh.
 * Returns how many cycles have failed in a row, and sets *due to when it would
 * have begun the next one, and *sqlstate to that of the last; 0 otherwise.
 */
int
slot_resume(TimestampTz *due, int *sqlstate)
{
	int			failures;

	lock_slots(LW_EXCLUSIVE);
	failures = MySlot->failures;
	*due = MySlot->due;
	*sqlstate = MySlot->status.last_error.sqlstate;
	MySlot->failures = 0;
	if (failures > 0)
		MySlot->status.state = WORKER_BACKOFF;
	unlock_slots();
	return failures;
}

/*
 * Leave it to the next process to go on after so many failures, when the next
 * cycle is due.  Returns false if the last one to do so did it less than so
 * many minutes ago, or if there is no shared memory to do it in.
 */
bool
slot_start_afresh(int failures, TimestampTz due, int minutes)
{
	TimestampTz now = GetCurrentTimestamp();
	bool		granted;

	lock_slots(LW_EXCLUSIVE);
	granted = Slots &&
		TimestampDifferenceExceeds(MySlot->afresh, now, minutes * 60 * 1000);
	if (granted)
	{
		MySlot->afresh = now;
		MySlot->failures = failures;
		MySlot->due = due;
	}
	unlock_slots();
	return granted;
}

/* May what we work on be made, if it is missing? */
bool
slot_may_make(void)
{
	bool		may_make;

	lock_slots(LW_SHARED);
	may_make = MySlot->may_make;
	unlock_slots();
	return may_make;
}

/* It is there.  Nothing is made after that: whoever drops it, means it. */
void
slot_has_made(void)
{
	lock_slots(LW_EXCLUSIVE);
	MySlot->may_make = false;
	unlock_slots();
}

/* Does a backend still wait for us to become ready? */
bool
slot_has_launcher(void)
{
	bool		launching;

	lock_slots(LW_SHARED);
	launching = MySlot->launching;
	unlock_slots();
	return launching;
}

/* Has somebody told us to stop? */
bool
slot_is_stopping(void)
{
	bool		stop;

	lock_slots(LW_SHARED);
	stop = MySlot->stop;
	unlock_slots();
	return stop;
}

/*
 * IDLE, BACKOFF -> BUSY, before the first snapshot of a cycle.  Returns
 * whether somebody waits for it.
 */
bool
slot_begin_cycle(void)
{
	bool		awaited;

	lock_slots(LW_EXCLUSIVE);
	if (MySlot->status.state != WORKER_STARTING)
		MySlot->status.state = WORKER_BUSY;
	serving = MySlot->asked;
	awaited = MySlot->asked > MySlot->answered;
	unlock_slots();

	rows_in_cycle = 0;

	/* only counters: begin */
	(void) pg_atomic_exchange_u32(&MySlot->wake, 0);
	/* only counters: end */
	return awaited;
}

/* STARTING -> BUSY, and whoever launched us can go on. */
void
slot_ready(void)
{
	lock_slots(LW_EXCLUSIVE);
	MySlot->status.state = WORKER_BUSY;
	if (MySlot->launcher)
		SetLatch(MySlot->launcher);
	if (!Slots)
		MySlot->launching = false;
	unlock_slots();
}

/* Count what a transaction of the cycle has done, and what is left over. */
void
slot_progress(int64 rows_done, int64 rows_left)
{
	rows_in_cycle += rows_done;
	lock_slots(LW_EXCLUSIVE);
	MySlot->status.rows_done += rows_done;
	MySlot->status.rows_left = rows_left;
	unlock_slots();
}

/* Note an error for the view.  The caller holds the lock. */
static void
note_error(const WorkerError *error)
{
	MySlot->status.failed_count++;
	MySlot->status.last_failed_time = GetCurrentTimestamp();
	MySlot->status.last_error = *error;
}

/*
 * BUSY -> IDLE, or BACKOFF if the cycle failed; answer those who wait.
 *
 *		start		when it began
 *		next		when the next one is due
 *		failed		why the cycle failed, or NULL
 *		left		if it did not: why something is left over for now; its
 *					sqlstate is 0 if nothing is
 */
void
slot_end_cycle(TimestampTz start, TimestampTz next, const WorkerError *failed,
			   const WorkerError *left)
{
	WorkerStatus *status = &MySlot->status;
	TimestampTz now = GetCurrentTimestamp();

	lock_slots(LW_EXCLUSIVE);
	status->state = failed ? WORKER_BACKOFF : WORKER_IDLE;
	status->next_cycle_time = next;
	if (rows_in_cycle > 0)
	{
		status->cycles++;
		status->last_done_time = now;
		status->last_done_ms = (now - start) / 1000.0;
	}

	MySlot->answered = serving;
	if (failed)
	{
		note_error(failed);
		MySlot->answer = *failed;
	}
	else
	{
		status->done_until = start;
		if (left->sqlstate != 0)
			MySlot->answer = status->last_error = *left;
		else
			MySlot->answered_well = serving;
	}
	unlock_slots();

	rows_in_cycle = 0;
	ConditionVariableBroadcast(&MySlot->changed);
}

/* An error that was none of a cycle. */
void
slot_note_error(const WorkerError *error)
{
	lock_slots(LW_EXCLUSIVE);
	note_error(error);
	unlock_slots();
}

/* Say when the next cycle is due, and learn what to do until then. */
NapOrder
slot_nap(TimestampTz next)
{
	NapOrder	order;

	lock_slots(LW_EXCLUSIVE);
	MySlot->status.next_cycle_time = next;
	order = MySlot->stop ? NAP_STOP :
		MySlot->asked > MySlot->answered ? NAP_WORK_NOW : NAP_ON;
	unlock_slots();
	return order;
}

/* only counters: begin */

/* Has a commit asked for a cycle since the last one began? */
bool
slot_woken(void)
{
	return pg_atomic_read_u32(&MySlot->wake) != 0;
}

/* only counters: end */

/*
 * any -> DOWN, (free), STOPPED: leave the slot, in the exit callback.
 *
 *		for_good	is this the end of the worker, and not of a process only?
 *		error		of which the process dies; sqlstate 0 if of none
 *
 * Returns whether it is for good: it also is if somebody has told us to stop,
 * or if a launcher waits for us, since a launch that fails leaves no worker.
 */
bool
slot_detach(bool for_good, const WorkerError *error)
{
	/*
	 * At exit the server releases the locks of a transaction only, and ours
	 * is the session's: left behind, it would keep our index taken.
	 */
	if (!Slots)
		LockReleaseAll(DEFAULT_LOCKMETHOD, true);

	lock_slots(LW_EXCLUSIVE);
	if (error->sqlstate != 0)
		note_error(error);
	if (error->sqlstate != 0 && !OidIsValid(MySlot->status.dboid))
		MySlot->connect_failures++;
	if (MySlot->stop || MySlot->launching)
		for_good = true;

	MySlot->answered = MySlot->asked;

	/* Others than a launcher learn that it is gone, not what it died of. */
	MySlot->answer = *error;
	if (!MySlot->launching)
		MySlot->answer.sqlstate = 0;
	MySlot->status.pid = 0;
	MySlot->status.dboid = MySlot->status.roleoid = InvalidOid;
	MySlot->status.next_cycle_time = 0;
	MySlot->latch = NULL;
	if (Slots)
		Slots->changes++;
	if (MySlot->launcher)
		SetLatch(MySlot->launcher); /* it reads the error, then unreserves */
	else if (for_good)
		leave_slot(MySlot);
	else
		MySlot->status.state = WORKER_DOWN;
	unlock_slots();
	ConditionVariableBroadcast(&MySlot->changed);
	return for_good;
}

/* DOWN -> (free): after slot_detach(), when the server will start no other. */
void
slot_forget(const WorkerParams *params)
{
	lock_slots(LW_EXCLUSIVE);
	if (MySlot->status.params.generation == params->generation)
		leave_slot(MySlot);
	unlock_slots();
	ConditionVariableBroadcast(&MySlot->changed);
}
