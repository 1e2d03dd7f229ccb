/* -------------------------------------------------------------------------
 *
 * fold.c
 *		The job of this worker: fold the deltas of a table into its totals.
 *
 * The rest of worker_spi could run any job; this file, stuck.c and table.c are
 * what makes it one that counts.  worker.c calls the four functions of the
 * contract in worker_spi.h, and looks after the process.
 *
 * A cycle takes the deltas away and adds their sums to the totals of their
 * keys.  It is a series of transactions, "shares", each a range of blocks of
 * counted.  There are three ways to fold one:
 *
 *		fast		two statements that see the same rows, under one snapshot.
 *					They lose a race with whoever changes a total, and fold
 *					nothing where a sum does not fit or a key is stuck
 *		safe		one statement that adds what it deletes; it is slower
 *		careful		key by key; what fails is moved to stuck
 *
 * A share that is not to be had in one way is done again in the next.  After
 * the shares, and now and then only, what is stuck is tried again: all of it if
 * somebody waits for that, or else a share of it in each cycle.
 *
 * A cycle that finds nothing is one read-only transaction: no transaction id,
 * no WAL.
 *
 * Copyright (c) 2026, worker_spi contributors
 *
 * -------------------------------------------------------------------------
 */

#include "postgres.h"

#include "access/relation.h"
#include "access/xact.h"
#include "catalog/pg_type.h"
#include "commands/async.h"
#include "executor/spi.h"
#include "miscadmin.h"
#include "storage/bufmgr.h"
#include "utils/builtins.h"
#include "utils/guc.h"
#include "utils/rel.h"
#include "utils/timeout.h"
#include "fold.h"

/* -------------------------------------------------------------------------
 * The statements of the fast way
 * -------------------------------------------------------------------------
 */

/*
 * Add the deltas of a range, from the ctid $1 up to, not including, $2, to
 * their totals.  Says how many deltas, how many sums and how many totals there
 * were: if the last two differ, some did not fit.
 */
static const char add_range[] =
"WITH sums AS MATERIALIZED ("
"SELECT " KEYS_ SUMS ", count(*) AS _rows"
" FROM ONLY " COUNTED " WHERE ctid >= $1 AND ctid < $2"
" GROUP BY (" KEYS ") HAVING count(*) > 0"
"), written AS ("
"INSERT INTO " TOTALS " AS total (" COLUMNS ") OVERRIDING SYSTEM VALUE"
" SELECT " NEW_TOTAL " FROM sums WHERE " FITS
" ON CONFLICT (" ARBITER ") DO UPDATE SET " ADDED " WHERE " ADDED_FITS
" RETURNING " COUNT " AS _count"
") SELECT"
" (SELECT CAST(COALESCE(sum(_rows), 0) AS bigint) FROM sums),"
" (SELECT count(*) FROM sums),"
" (SELECT count(*) FROM written),"
" (SELECT max(_count) FROM written)";

/* The columns of what it returns. */
enum
{
	ADD_ROWS = 1,				/* deltas */
	ADD_SUMS,					/* keys that have some */
	ADD_WRITTEN,				/* totals that were written */
	ADD_COUNT					/* the one total, if there are no keys */
};

/* Delete the same deltas. */
static const char delete_range[] =
"DELETE FROM ONLY " COUNTED " WHERE ctid >= $1 AND ctid < $2";

/* Is there any delta? */
static const char any_delta[] =
"SELECT ctid FROM ONLY " COUNTED " LIMIT 1";

/* -------------------------------------------------------------------------
 * Types and state
 * -------------------------------------------------------------------------
 */

/*
 * How long a share is to take.  Nobody is to wait for it for long; but a key
 * with deltas in many shares has its total written as many times, so there
 * are not to be many.  A share that takes longer than the last of these is
 * given up, and done again by halves.
 *
 * What it takes to read stuck does not count: a smaller share has to read as
 * much of it, and so shares would become smaller and smaller.
 */
#define SHARE_MIN_MS		1000
#define SHARE_MAX_MS		1700
#define SHARE_LIMIT_MS		3000
#define SHARE_LIMIT_AGAIN_MS 100	/* code may swallow a cancel */

#define MAX_SHARE			BLOCK_START(16384)	/* there may be few rows in it */

#define MIN_RETRY_MS		1000
#define MAX_RETRY_MS		60000

/* What a share does. */
typedef enum ShareWay
{
	WAY_FAST,
	WAY_SAFE,
	WAY_CAREFUL,
	WAY_RETRY,					/* what is stuck, again */
	WAY_NONE					/* it looks around, or says what has failed */
} ShareWay;

/* How large the next share may be, by what the last one took. */
static Position bulk_size = BLOCK_START(1024);	/* fast or safe */
static Position careful_size = BLOCK_START(64); /* or a retry */

typedef enum CyclePhase
{
	PHASE_RANGES,				/* fold one range after the other */
	PHASE_RETRY,				/* try again what is stuck */
	PHASE_COUNT,				/* count it */
	PHASE_RAISE					/* fail, if something has */
} CyclePhase;

/*
 * A cycle, as far as it is committed.  A share works on a copy, which takes
 * its place when the share is committed: a rollback does not put back static
 * variables.
 */
typedef struct FoldCycle
{
	bool		running;
	CyclePhase	phase;
	Oid			file;			/* of counted, when the cycle began */
	Position	next;			/* all before is done */
	Position	end;			/* of what this phase goes through */
	Position	careful_until;	/* from next to here, carefully */
	bool		safely;			/* the next share, in the safe way */

	/* keys that fail, perhaps by the table's fault */
	bool		may_move;		/* no: something has gone through */
	Position	left_from;		/* the ranges in which they were left */
	Position	left_until;		/* 0 if there are none */
	WorkerError left_error;		/* of the first */

	/* what makes the cycle fail in the end; sqlstate 0 if nothing does */
	WorkerError table_error;
	WorkerError unmoved_error;
	bool		held;

	/* for the log */
	bool		has_count;
	int64		rows;
	int64		totals;
	int64		count;

	/* what is stuck, from one cycle to the next */
	int64		stuck_rows;
	WorkerError stuck_error;	/* of what is stuck longest */
	bool		recount;		/* have rows come or gone? */
	bool		retry;			/* is it to be tried again in this cycle? */
	bool		retry_all;		/* all of it, or a share, and then go on? */
	Position	retry_next;		/* where the next retry begins */
	Position	stuck_end;		/* of stuck, when the cycle began */
	int			retries;		/* since nothing was stuck */
	TimestampTz retry_due;		/* when to try again */
} FoldCycle;

/* What a share is doing, for when it fails. */
typedef struct FoldShare
{
	enum
	{
		STEP_TABLES,			/* not at the rows yet */
		STEP_ROWS,
		STEP_COMMIT
	}			step;
	ShareWay	way;
	Position	from;
	Position	to;
	int64		ms;				/* how long it took, but for reading stuck */
	int64		rows;			/* that it has folded */
	bool		notifies;
	bool		emptied;		/* has somebody else emptied stuck? */
	const CountedTables *tables;
} FoldShare;

static FoldCycle Cycle;			/* as it is committed */
static FoldCycle Next;			/* as the share under way leaves it */
static FoldShare Share;
static char my_table[NAMEDATALEN];	/* for notifications */
static const char *my_name;		/* for messages */
static TimeoutId share_timeout;
static TimestampTz share_start;
static volatile sig_atomic_t share_timed_out = false;

static bool looked_again = false;	/* for a name, since the last good share */
static bool notify_failed = false;	/* in this cycle */
static bool notify_failed_logged = false;

static ShareWay choose_way(void);
static Position *share_size(void);
static void begin_cycle(bool asked);
static bool run_share(void);
static int64 share_ms(void);
static bool fold_fast(ShareResult *result);
static void take_result(const ShareResult *result);
static void next_phase(void);
static void schedule_retry(void);
static void raise_failure(void);
static bool try_otherwise(const WorkerError *error, bool gave_up);
static void adapt_size(void);
static void log_cycle(void);
static Position table_end(Oid relid, Oid *file);
static void share_limit_reached(void);

/* -------------------------------------------------------------------------
 * The contract with worker.c
 * -------------------------------------------------------------------------
 */

/* See worker_spi.h. */
const char *
job_init(int index)
{
	snprintf(my_table, sizeof(my_table), "schema%d.counted", index);
	share_timeout = RegisterTimeout(USER_TIMEOUT, share_limit_reached);
	stuck_init();
	my_name = table_init(index);
	return my_name;
}

/* See worker_spi.h. */
bool
job_step(JobProgress *progress)
{
	Oid			file;

	memset(&Share, 0, sizeof(Share));
	Share.way = choose_way();
	Next = Cycle;
	stuck_begin_share();

	/*
	 * The two statements of the fast way are to see the same rows.  In the
	 * other ways, whoever waits for a row is to see what has become of it.
	 * The server takes this as long as there is no snapshot.
	 */
	XactIsoLevel = Share.way == WAY_FAST ? XACT_REPEATABLE_READ :
		XACT_READ_COMMITTED;

	Share.tables = table_open(progress->may_make);
	if (Share.tables == NULL)
		return true;
	progress->tables_ready = true;

	Share.step = STEP_ROWS;
	(void) table_end(Share.tables->counted, &file);
	if (!Cycle.running || file != Cycle.file)
		begin_cycle(progress->asked);
	else if (!run_share())
	{
		Cycle.safely = true;
		progress->undo = true;
		return true;
	}
	next_phase();
	table_close();
	Share.step = STEP_COMMIT;

	/*
	 * After a crash a share was made or it was not: no need to wait for the
	 * disk.  But a crash empties an unlogged table, and what was taken out of
	 * it must not be in a total that it takes back.
	 */
	(void) set_config_option("synchronous_commit",
							 Share.tables->loses_deltas ? "local" : "off",
							 PGC_USERSET, PGC_S_SESSION, GUC_ACTION_LOCAL,
							 true, 0, false);
	if (worker_spi_notify && !notify_failed && Share.rows > 0)
	{
		Async_Notify("worker_spi", Share.tables->has_count ?
					 psprintf("%s " INT64_FORMAT, my_table, Next.count) :
					 my_table);
		Share.notifies = true;
	}

	progress->rows_done = Share.rows;
	progress->rows_left = Next.stuck_rows;
	progress->pending_error = Next.stuck_error;
	if (Next.stuck_rows > 0)
		progress->again_ms =
			Max(TimestampDifferenceMilliseconds(GetCurrentTimestamp(),
												Next.retry_due), 1);
	return Next.running;
}

/* See worker_spi.h. */
void
job_committed(void)
{
	table_committed();
	if (Share.tables == NULL)
		return;
	Cycle = Next;
	looked_again = false;
	if (Share.notifies)
		notify_failed_logged = false;
	adapt_size();

	stuck_committed(Share.tables);
	if (Share.emptied)
		ereport(LOG,
				(errmsg("%s: nothing of %s is stuck any more",
						MyBgworkerEntry->bgw_name, Share.tables->name)));
	if (!Cycle.running)
		log_cycle();
}

/* See worker_spi.h. */
bool
job_failed(const WorkerError *error)
{
	bool		gave_up = share_timed_out &&
		error->sqlstate == ERRCODE_QUERY_CANCELED;

	share_timed_out = false;

	/* The queue of notifications may be full: fold all the same. */
	if (Share.step == STEP_COMMIT && Share.notifies)
	{
		if (!notify_failed_logged)
			ereport(LOG,
					(errmsg("%s folds %s without a notification: %s",
							MyBgworkerEntry->bgw_name, Share.tables->name,
							error->message)));
		notify_failed = notify_failed_logged = true;
		return true;
	}
	if (Share.step == STEP_ROWS && try_otherwise(error, gave_up))
		return true;

	/* What it had committed until then is folded. */
	log_cycle();
	Cycle.running = false;
	table_forget();
	return false;
}

/* -------------------------------------------------------------------------
 * A cycle: ranges first, then what is stuck
 * -------------------------------------------------------------------------
 */

/* In which way does this share go about it? */
static ShareWay
choose_way(void)
{
	if (!Cycle.running || Cycle.phase > PHASE_RETRY)
		return WAY_NONE;
	if (Cycle.phase == PHASE_RETRY)
		return WAY_RETRY;
	if (Cycle.next < Cycle.careful_until)
		return WAY_CAREFUL;
	return Cycle.safely || Cycle.stuck_rows > 0 ? WAY_SAFE : WAY_FAST;
}

static Position *
share_size(void)
{
	return Share.way == WAY_FAST || Share.way == WAY_SAFE ?
		&bulk_size : &careful_size;
}

/*
 * Begin a cycle, or begin it again if VACUUM FULL or the like has moved all.
 * Blocks that are added to the table from now on are left for the next one, or
 * a cycle might never end.
 */
static void
begin_cycle(bool asked)
{
	TimestampTz now = GetCurrentTimestamp();
	int64		stuck_rows = Next.stuck_rows;

	if (!Next.running)
	{
		FoldCycle	fresh = {
			.running = true,
			.retries = Next.retries,
			.retry_due = Next.retry_due,
			.retry_next = asked ? 0 : Next.retry_next
		};

		Next = fresh;
		notify_failed = false;
	}
	Next.has_count = Share.tables->has_count;
	Next.phase = PHASE_RANGES;
	Next.next = Next.careful_until = Next.left_until = 0;
	Next.end = table_end(Share.tables->counted, &Next.file);
	if (Next.end > 0)
	{
		table_run(table_statement(any_delta), NULL, NULL, SPI_OK_SELECT);
		if (SPI_processed == 0)
			Next.next = Next.end;
	}

	Next.stuck_end = table_end(Share.tables->stuck, NULL);
	Next.stuck_rows = 0;
	Next.stuck_error.sqlstate = 0;
	if (Next.stuck_end > 0)
		Next.stuck_rows = stuck_count(&Next.stuck_error);
	Share.emptied = stuck_rows > 0 && Next.stuck_rows == 0;
	if (Next.stuck_rows == 0)
		Next.retries = Next.retry_next = 0;
	Next.retry_all = asked;

	/* A clock that is set back must not keep it waiting. */
	if (Next.stuck_rows > 0)
		Next.retry = asked || now >= Next.retry_due ||
			Next.retry_due - now > MAX_RETRY_MS * INT64CONST(1000);
}

/*
 * Do what the phase is for.  Returns false if it is to be undone, and done in
 * the safe way.
 */
static bool
run_share(void)
{
	ShareResult result = {0};
	Position	size = *share_size();
	bool		done = true;

	if (Next.phase == PHASE_COUNT)
	{
		Next.stuck_rows = stuck_count(&Next.stuck_error);
		return true;
	}
	if (Next.phase == PHASE_RAISE)
		raise_failure();

	/* The last one takes the rest, if that is not much more. */
	Share.from = Next.next;
	Share.to = Next.end - Share.from > size * 1.3 ? Share.from + size : Next.end;
	if (Share.way == WAY_CAREFUL)
		Share.to = Min(Share.to, Next.careful_until);
	share_start = GetCurrentTimestamp();
	if (Share.to - Share.from > 1)
		enable_timeout_every(share_timeout,
							 TimestampTzPlusMilliseconds(share_start, SHARE_LIMIT_MS),
							 SHARE_LIMIT_AGAIN_MS);
	if (Share.way != WAY_RETRY && OidIsValid(Share.tables->toast) &&
		table_end(Share.tables->toast, NULL) > 0)
		stuck_move_long_keys(Share.from, Share.to, Share.way == WAY_CAREFUL,
							 &result);
	switch (Share.way)
	{
		case WAY_FAST:
			done = fold_fast(&result);
			break;
		case WAY_SAFE:
			stuck_fold_range(Share.tables, Share.from, Share.to,
							 Next.stuck_rows > 0, &result);
			break;
		case WAY_CAREFUL:
			stuck_fold_carefully(Share.tables, Share.from, Share.to,
								 Next.stuck_rows > 0, Next.may_move, &result);
			break;
		case WAY_RETRY:
			stuck_retry(Share.tables, Share.from, Share.to, &result);
			break;
		case WAY_NONE:
			break;
	}
	Share.ms = share_ms();
	disable_timeout(share_timeout, false);
	if (share_timed_out)
		share_timed_out = QueryCancelPending = false;	/* it was too late */

	take_result(&result);
	return done;
}

/*
 * How long has the share taken by now?  While it reads stuck, the time stands.
 * Called in a signal handler.
 */
static int64
share_ms(void)
{
	return (GetCurrentTimestamp() - share_start) / 1000 - stuck_read_ms;
}

/* What a share has done becomes part of the cycle. */
static void
take_result(const ShareResult *result)
{
	Next.next = Share.to;
	Next.safely = false;
	Share.rows = result->rows;
	Next.rows += result->rows;
	Next.totals += result->totals;
	if (result->totals > 0)
		Next.count = result->count;
	Next.stuck_rows += result->moved;
	Next.recount |= result->moved > 0 || Share.way == WAY_RETRY;
	Next.held |= result->held;
	if (Next.unmoved_error.sqlstate == 0)
		Next.unmoved_error = result->unmoved_error;

	/* Keys that do not all fail alike fail by their own fault. */
	Next.may_move |= result->went_through ||
		(Next.left_error.sqlstate != 0 && result->left_error.sqlstate != 0 &&
		 Next.left_error.sqlstate != result->left_error.sqlstate);
	if (result->left)
	{
		if (Next.left_until == 0)
		{
			Next.left_from = Share.from;
			Next.left_error = result->left_error;
		}
		Next.left_until = Share.to;
	}
}

/*
 * The fast way.  Returns false if a sum does not fit: then nothing of it is to
 * stay.
 */
static bool
fold_fast(ShareResult *result)
{
	static const Oid types[] = {TIDOID, TIDOID};
	ItemPointerData bounds[2];
	Datum		range[] = {
		position_tid(Share.from, &bounds[0]),
		position_tid(Share.to, &bounds[1])
	};
	ParamListInfo params = table_params(lengthof(types), types, range);

	table_run(table_statement(add_range), NULL, params, SPI_OK_SELECT);
	result->rows = table_int64(ADD_ROWS);
	result->totals = table_int64(ADD_WRITTEN);
	result->count = table_int64(ADD_COUNT);
	result->went_through = result->totals > 0;
	if (result->totals < table_int64(ADD_SUMS))
		return false;

	/* Code of the owner's may have deleted some, and the count would be off. */
	if (result->rows > 0)
	{
		table_run(table_statement(delete_range), NULL, params, SPI_OK_DELETE);
		if (SPI_processed != (uint64) result->rows)
			ereport(ERROR,
					(errcode(ERRCODE_TRIGGERED_DATA_CHANGE_VIOLATION),
					 errmsg("cannot fold table \"%s\"", Share.tables->name),
					 errdetail("A trigger has changed its deltas.")));
	}
	return true;
}

/*
 * All ranges are done, but for keys that have failed.  Are they to be moved?
 * Then go through the ranges in which they are once more.
 */
static bool
go_back_to_what_is_left(void)
{
	if (Next.left_until == 0)
		return false;
	switch (ERRCODE_TO_CATEGORY(Next.left_error.sqlstate))
	{
		case ERRCODE_DATA_EXCEPTION:
		case ERRCODE_INTEGRITY_CONSTRAINT_VIOLATION:
		case ERRCODE_PROGRAM_LIMIT_EXCEEDED:
			Next.may_move = true;
	}
	if (Next.may_move)
	{
		Next.next = Next.left_from;
		Next.end = Next.careful_until = Next.left_until;
	}
	else
		Next.table_error = Next.left_error;
	Next.left_until = 0;
	return Next.may_move;
}

/* Go on to the next phase that has something to do, if this one is over. */
static void
next_phase(void)
{
	if (Next.phase == PHASE_RANGES)
	{
		if (Next.next < Next.end || go_back_to_what_is_left())
			return;
		Next.phase = PHASE_RETRY;
		Next.next = Next.retry_next;
		Next.end = Next.retry && Next.table_error.sqlstate == 0 ?
			Next.stuck_end : 0;
	}
	if (Next.phase == PHASE_RETRY)
	{
		bool		more = Next.next < Next.end;

		/* Unless somebody waits for all of it, new deltas come first. */
		if (more && (Next.retry_all || Share.way != WAY_RETRY))
			return;
		if (Next.retry)
			Next.retry_next = more ? Next.next : 0;
		Next.phase = PHASE_COUNT;
		if (Next.recount)
			return;
	}
	if (Next.phase == PHASE_COUNT)
	{
		schedule_retry();
		Next.phase = PHASE_RAISE;
		if (Next.table_error.sqlstate != 0 || Next.held ||
			Next.unmoved_error.sqlstate != 0)
			return;
	}
	Next.running = false;
}

/*
 * When is what is stuck to be tried again?  The delay doubles each time that
 * all of it was.
 */
static void
schedule_retry(void)
{
	if (Next.stuck_rows == 0)
		Next.retries = 0;
	else if (Next.retry_next > 0)
		Next.retry_due = GetCurrentTimestamp();
	else if (Next.retry || Next.retries == 0)
	{
		int			delay = Min(MIN_RETRY_MS << Min(Next.retries, 6), MAX_RETRY_MS);

		Next.retries++;
		Next.retry_due = TimestampTzPlusMilliseconds(GetCurrentTimestamp(), delay);
	}
}

/* All else is done: fail with what has gone wrong on the way. */
static void
raise_failure(void)
{
	const WorkerError *error = Next.table_error.sqlstate != 0 ?
		&Next.table_error : &Next.unmoved_error;

	if (error->sqlstate == 0)
		ereport(ERROR,
				(errcode(ERRCODE_LOCK_NOT_AVAILABLE),
				 errmsg("could not fold all of \"%s\"", Share.tables->name),
				 errdetail("Others hold deltas or totals locked.  All else is folded.")));
	ereport(ERROR,
			(errcode(error->sqlstate),
			 errmsg_internal("%s", error->message),
			 error->detail[0] ? errdetail_internal("%s", error->detail) : 0,
			 error->hint[0] ? errhint("%s", error->hint) : 0));
}

/*
 * A share has failed over its rows.  Is it to be done again in another way?
 */
static bool
try_otherwise(const WorkerError *error, bool gave_up)
{
	bool		lost_race = false;

	if (Share.way == WAY_NONE)
		return false;

	/* It takes too long, or too much: in halves. */
	if (gave_up || ERRCODE_TO_CATEGORY(error->sqlstate) == ERRCODE_INSUFFICIENT_RESOURCES)
	{
		*share_size() = Max((Share.to - Share.from) / 2, 1);
		return Share.to - Share.from > 1;
	}

	switch (error->sqlstate)
	{
		case ERRCODE_UNDEFINED_FUNCTION:
		case ERRCODE_UNDEFINED_OBJECT:
		case ERRCODE_UNDEFINED_SCHEMA:
		case ERRCODE_INVALID_COLUMN_REFERENCE:
			/* A name in the statements may be out of date. */
			if (!looked_again)
			{
				table_forget();
				looked_again = true;
				return true;
			}
			break;
		case ERRCODE_T_R_SERIALIZATION_FAILURE:
		case ERRCODE_T_R_DEADLOCK_DETECTED:
		case ERRCODE_UNIQUE_VIOLATION:
			/* Somebody else has changed the same total. */
			lost_race = true;
			break;
	}

	if (Share.way == WAY_FAST && lost_race)
		Cycle.safely = true;
	else if ((Share.way == WAY_FAST || Share.way == WAY_SAFE) &&
			 (lost_race || error->sqlstate == ERRCODE_LOCK_NOT_AVAILABLE))
		Cycle.careful_until = Cycle.end;
	else if ((Share.way == WAY_FAST || Share.way == WAY_SAFE) &&
			 stuck_is_key_error(error->sqlstate))
		Cycle.careful_until = Share.to;
	else
		return false;
	return true;
}

/*
 * How large may the next share be?  A bit larger or smaller than this one: if
 * it were sized by what this one took, one that was slow by chance would make
 * all later ones small.
 */
static void
adapt_size(void)
{
	Position   *size = share_size();
	Position	done = Share.to - Share.from;

	if (Share.way == WAY_NONE)
		return;
	if (Share.ms > SHARE_MAX_MS)
		*size = Max(done * 0.6, 1);
	else if (Share.ms < SHARE_MIN_MS && done >= *size)
		*size = Min(done * (Share.ms < SHARE_MIN_MS / 3 ? 3 : 1.7) + 1, MAX_SHARE);
}

/* Say what a cycle has folded, also if it has failed in the end. */
static void
log_cycle(void)
{
	stuck_end_cycle(my_name);
	if (worker_spi_log_folds && Cycle.rows > 0)
	{
		if (Cycle.has_count)
			ereport(LOG,
					(errmsg("%s: count in %s is now " INT64_FORMAT,
							MyBgworkerEntry->bgw_name, my_name, Cycle.count)));
		else
			ereport(LOG,
					(errmsg("%s: folded " INT64_FORMAT " rows into " INT64_FORMAT " totals of %s",
							MyBgworkerEntry->bgw_name, Cycle.rows, Cycle.totals,
							my_name)));
	}
	Cycle.rows = 0;
}

/* Where a table ends, and in which file it is, if that is asked for. */
static Position
table_end(Oid relid, Oid *file)
{
	Relation	rel = relation_open(relid, AccessShareLock);
	Position	end = BLOCK_START(RelationGetNumberOfBlocks(rel));

	if (file)
		*file = rel->rd_rel->relfilenode;
	relation_close(rel, NoLock);
	return end;
}

/*
 * A share takes too long: cancel it, as pg_cancel_backend() would.  The flag
 * tells the two apart.
 */
static void
share_limit_reached(void)
{
	if (stuck_is_read || share_ms() < SHARE_LIMIT_MS)
		return;
	share_timed_out = true;
	QueryCancelPending = true;
	InterruptPending = true;
}
