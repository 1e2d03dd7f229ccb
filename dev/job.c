/* -------------------------------------------------------------------------
 *
 * job.c
 *		The job: worker N deletes rows that are past their age, as the policies
 *		in schemaN.policies say.
 *
 * worker.c looks after the process, and calls the four functions of the
 * contract in worker_spi.h.  This is one job, and an example of most: there is
 * a list of items, here policies, each of which names a table; and
 *
 *		shares are short		one deletes a batch of rows by one policy
 *		a bad item stops none	one that fails is left out, named in the log
 *								once, and tried again later
 *		nobody gains rights		what is done to a table is done as its owner
 *		nothing is believed		before it is committed
 *
 * For another job, write another list of items.  The rest can stay as it is.
 *
 * -------------------------------------------------------------------------
 */

#include "postgres.h"

#include "access/relation.h"
#include "access/xact.h"
#include "commands/dbcommands.h"
#include "commands/trigger.h"
#include "executor/spi.h"
#include "miscadmin.h"
#include "nodes/makefuncs.h"
#include "parser/parse_node.h"
#include "pgstat.h"
#include "utils/builtins.h"
#include "utils/guc.h"
#include "utils/lsyscache.h"
#include "utils/memutils.h"
#include "utils/rel.h"
#include "utils/snapmgr.h"
#include "worker_spi.h"

/* -------------------------------------------------------------------------
 * Types and state
 * -------------------------------------------------------------------------
 */

#define MAX_BATCH		10000	/* whatever a policy asks for */
#define MAX_LOST_RACES	5		/* in a row */
#define MIN_RETRY_MS	1000
#define MAX_RETRY_MS	60000

/* An item of the list.  What it points to lasts as long as the share. */
typedef struct JobItem
{
	int64		key;			/* unique; items are done in its order; here
								 * the OID of the policy's table */
	char		name[ERROR_TEXT_SIZE];	/* for the log */
	const char *age_column;
	const char *max_age;
	int			batch;
	Oid			owner;			/* of the list */
} JobItem;

/* An item that has failed, and is left out for now. */
typedef struct LeftOut
{
	int64		key;
	WorkerError error;			/* why */
	int			failures;		/* in a row */
	TimestampTz due;			/* when to try it again */
	TimestampTz met;			/* the last cycle that found it in the list */
} LeftOut;

static char schema[NAMEDATALEN];	/* in which the list is */
static char list_name[3 * NAMEDATALEN]; /* of the list, for the log */

/*
 * The cycle.  A rollback does not put this back, so what a share finds out
 * gets in here when it is committed, or has failed.
 */
static bool in_cycle = false;
static TimestampTz cycle_start;
static int64 done_until;		/* all items up to this one are done */
static int	lost_races = 0;		/* in a row */
static int64 failed_at = PG_INT64_MIN;	/* the item at which a cycle failed */
static List *left_out = NIL;	/* of LeftOut, the oldest first */

/* The share under way. */
static JobItem item;
static enum
{
	SHARE_READS,				/* has not come to an item yet */
	SHARE_SKIPS,				/* its item is left out */
	SHARE_WORKS,				/* on its item */
	SHARE_FINDS_NONE			/* the list is at its end */
}			share;
static bool more;				/* is there more to do for the item? */

static bool read_item(void);
static int64 do_item(void);
static LeftOut *find_left_out(int64 key);
static void report_left_out(JobProgress *progress);
static void check_ordinary(Relation rel);
static void run_as_owner(Relation rel, const char *sql, int expected);

/* -------------------------------------------------------------------------
 * The contract with worker.c: the same for any list
 * -------------------------------------------------------------------------
 */

/* See worker_spi.h. */
const char *
job_init(int index)
{
	snprintf(schema, sizeof(schema), "schema%d", index);
	StartTransactionCommand();
	snprintf(list_name, sizeof(list_name), "%s.%s.policies",
			 get_database_name(MyDatabaseId), schema);
	CommitTransactionCommand();
	return list_name;
}

/* See worker_spi.h.  A share is about one item of the list. */
bool
job_step(JobProgress *progress)
{
	TimestampTz now = GetCurrentTimestamp();
	LeftOut    *left;

	share = SHARE_READS;
	more = false;
	if (!in_cycle)
	{
		in_cycle = true;
		cycle_start = now;
		done_until = PG_INT64_MIN;
	}

	/*
	 * The database may have other defaults.  What a crash takes back is done
	 * again, so no commit need wait for the disk.
	 */
	XactIsoLevel = XACT_READ_COMMITTED;
	(void) set_config_option("synchronous_commit", "off", PGC_USERSET,
							 PGC_S_SESSION, GUC_ACTION_LOCAL, true, 0, false);

	if (!read_item())
		share = SHARE_FINDS_NONE;
	else
	{
		/* A clock that is set back must not make it wait longer. */
		left = find_left_out(item.key);
		share = left && !progress->asked && now < left->due &&
			left->due - now <= MAX_RETRY_MS * INT64CONST(1000) ?
			SHARE_SKIPS : SHARE_WORKS;
		if (share == SHARE_WORKS)
			progress->rows_done = do_item();
	}
	progress->tables_ready = true;
	report_left_out(progress);
	return share != SHARE_FINDS_NONE;
}

/* See worker_spi.h. */
void
job_committed(void)
{
	LeftOut    *left = find_left_out(item.key);
	ListCell   *lc;

	lost_races = 0;
	if (share != SHARE_FINDS_NONE && left)
		left->met = cycle_start;
	if (share == SHARE_WORKS && !more && failed_at == item.key)
		failed_at = PG_INT64_MIN;
	if (share == SHARE_WORKS && !more && left)
	{
		left_out = list_delete_ptr(left_out, left);
		pfree(left);
		ereport(LOG,
				(errmsg("%s no longer leaves out %s",
						MyBgworkerEntry->bgw_name, item.name)));
	}
	if (share != SHARE_FINDS_NONE)
	{
		if (!more)
			done_until = item.key;
		return;
	}

	/* What has not been met is no longer in the list. */
	in_cycle = false;
	foreach(lc, left_out)
	{
		left = lfirst(lc);
		if (left->met != cycle_start)
		{
			left_out = foreach_delete_current(left_out, lc);
			pfree(left);
		}
	}
}

/* See worker_spi.h.  There is no transaction, so no catalog can be read. */
bool
job_failed(const WorkerError *error)
{
	LeftOut    *left;
	int			category = ERRCODE_TO_CATEGORY(error->sqlstate);

	/* Somebody else has changed the same row: once more. */
	if (category == ERRCODE_TRANSACTION_ROLLBACK &&
		lost_races++ < MAX_LOST_RACES)
		return true;
	lost_races = 0;

	/*
	 * Is it the fault of no item?  Such as: read-only, disk full, canceled.
	 * But code of a table can raise these as well, so an item at which two
	 * cycles fail in a row is not to stop the others.
	 */
	if (share != SHARE_WORKS ||
		((category == ERRCODE_INVALID_TRANSACTION_STATE ||
		  category == ERRCODE_INSUFFICIENT_RESOURCES ||
		  category == ERRCODE_OPERATOR_INTERVENTION) &&
		 failed_at != item.key))
	{
		in_cycle = false;
		if (share == SHARE_WORKS)
			failed_at = item.key;
		return false;
	}

	left = find_left_out(item.key);
	if (left == NULL)
	{
		MemoryContext caller_context = MemoryContextSwitchTo(TopMemoryContext);

		left = palloc0(sizeof(LeftOut));
		left->key = item.key;
		left_out = lappend(left_out, left);
		MemoryContextSwitchTo(caller_context);
		ereport(LOG,
				(errmsg("%s leaves out %s: %s (SQLSTATE %s)",
						MyBgworkerEntry->bgw_name, item.name, error->message,
						unpack_sql_state(error->sqlstate)),
				 error->detail[0] ? errdetail_internal("%s", error->detail) : 0));
	}
	left->error = *error;
	left->met = cycle_start;
	left->due = TimestampTzPlusMilliseconds(GetCurrentTimestamp(),
											Min(MIN_RETRY_MS << Min(left->failures, 6), MAX_RETRY_MS));
	left->failures++;
	done_until = item.key;		/* go on with the next */
	return true;
}

static LeftOut *
find_left_out(int64 key)
{
	ListCell   *lc;

	foreach(lc, left_out)
	{
		if (((LeftOut *) lfirst(lc))->key == key)
			return lfirst(lc);
	}
	return NULL;
}

/* Say how much is left out, why, and when to come again for it. */
static void
report_left_out(JobProgress *progress)
{
	TimestampTz now = GetCurrentTimestamp();
	ListCell   *lc;

	foreach(lc, left_out)
	{
		LeftOut    *left = lfirst(lc);
		int			delay = Max(TimestampDifferenceMilliseconds(now, left->due), 1);

		if (share == SHARE_FINDS_NONE && left->met != cycle_start)
			continue;			/* job_committed() will forget it */
		if (progress->rows_left++ == 0)
			progress->pending_error = left->error;
		if (progress->again_ms == 0 || progress->again_ms > delay)
			progress->again_ms = delay;
	}
}

/* -------------------------------------------------------------------------
 * The list: what is this job's own
 * -------------------------------------------------------------------------
 */

/*
 * Read the next item.  Returns false if there is none.  An error here stops all
 * items; so what may be wrong with one is for do_item() to find out.
 *
 * A lock keeps a table what it is until the transaction ends: its kind, owner,
 * columns and rules.  A snapshot must come after the lock, or it would miss
 * changes; under READ COMMITTED, each statement takes its own.
 */
static bool
read_item(void)
{
	Relation	rel = relation_openrv_extended(makeRangeVar(schema, "policies", -1),
											   AccessShareLock, true);
	char	   *values[5];

	if (rel == NULL)
		ereport(ERROR,
				(errcode(ERRCODE_UNDEFINED_TABLE),
				 errmsg("table \"%s\" does not exist", list_name),
				 errhint("CREATE TABLE %s.policies (tab regclass PRIMARY KEY, age_column name NOT NULL, max_age interval NOT NULL, batch integer NOT NULL DEFAULT 1000)",
						 schema)));
	check_ordinary(rel);
	item.owner = rel->rd_rel->relowner;
	run_as_owner(rel,
				 psprintf("SELECT CAST(tab AS oid), CAST(tab AS text),"
						  " COALESCE(CAST(age_column AS text), ''),"
						  " COALESCE(CAST(max_age AS text), ''),"
						  " COALESCE(CAST(batch AS integer), 0)"
						  " FROM ONLY %s.policies WHERE CAST(tab AS oid) > %u"
						  " ORDER BY CAST(tab AS oid) LIMIT 1",
						  schema, (Oid) done_until),
				 SPI_OK_SELECT);
	relation_close(rel, NoLock);
	if (SPI_processed == 0)
		return false;

	for (int i = 0; i < lengthof(values); i++)
		values[i] = SPI_getvalue(SPI_tuptable->vals[0], SPI_tuptable->tupdesc,
								 i + 1);
	item.key = atooid(values[0]);
	copy_error_text(item.name, values[1]);
	item.age_column = values[2];
	item.max_age = values[3];
	item.batch = Max(1, Min(atoi(values[4]), MAX_BATCH));
	return true;
}

/*
 * Delete a batch of rows that are past their age, but for those that somebody
 * holds locked.  Returns how many.  An index on the column of the age keeps it
 * short.
 */
static int64
do_item(void)
{
	Relation	rel = try_relation_open((Oid) item.key, RowExclusiveLock);
	const char *table;

	if (rel == NULL)
		ereport(ERROR,
				(errcode(ERRCODE_UNDEFINED_TABLE),
				 errmsg("there is no table with OID %u", (Oid) item.key)));
	check_ordinary(rel);

	/* A policy lets nobody do to a table what he could not do himself. */
	if (!can_act_as(item.owner, rel->rd_rel->relowner))
		ereport(ERROR,
				(errcode(ERRCODE_INSUFFICIENT_PRIVILEGE),
				 errmsg("owner of \"%s\" cannot act as the owner of \"%s\"",
						list_name, RelationGetRelationName(rel))));

	table = quote_qualified_identifier(get_namespace_name(RelationGetNamespace(rel)),
									   RelationGetRelationName(rel));
	run_as_owner(rel,
				 psprintf("DELETE FROM ONLY %s WHERE ctid = ANY (ARRAY("
						  "SELECT ctid FROM ONLY %s"
						  " WHERE %s < now() - CAST(%s AS interval)"
						  " LIMIT %d FOR UPDATE SKIP LOCKED))",
						  table, table, quote_identifier(item.age_column),
						  quote_literal_cstr(item.max_age), item.batch),
				 SPI_OK_DELETE);
	relation_close(rel, NoLock);
	more = SPI_processed == item.batch;
	return SPI_processed;
}

/* -------------------------------------------------------------------------
 * Other people's tables: the same for any job
 * -------------------------------------------------------------------------
 */

/* Refuse what would have a statement do something else than it says. */
static void
check_ordinary(Relation rel)
{
	if (rel->rd_rel->relkind != RELKIND_RELATION || rel->rd_rules)
		ereport(ERROR,
				(errcode(ERRCODE_WRONG_OBJECT_TYPE),
				 errmsg("\"%s\" is not an ordinary table without rules",
						RelationGetRelationName(rel))));
}

/*
 * The parser calls this for each column in a statement; arg is the OID of the
 * table that it is about.  A lock keeps a table from being renamed, but not
 * its schema: somebody could rename that, and put a table with triggers of his
 * own in its place.
 */
static Node *
check_statement_table(ParseState *pstate, ColumnRef *cref)
{
	Oid			relid = *(Oid *) pstate->p_ref_hook_state;
	ListCell   *lc;

	foreach(lc, pstate->p_rtable)
	{
		RangeTblEntry *rte = lfirst_node(RangeTblEntry, lc);

		if (rte->rtekind == RTE_RELATION && rte->relid != relid)
			ereport(ERROR,
					(errcode(ERRCODE_OBJECT_IN_USE),
					 errmsg("table was replaced while it was worked on")));
	}
	return NULL;				/* let the parser go on as usual */
}

static void
setup_parser(ParseState *pstate, void *arg)
{
	pstate->p_pre_columnref_hook = check_statement_table;
	pstate->p_ref_hook_state = arg;
}

/*
 * Run a statement on a table as its owner, with none of our own privileges, as
 * VACUUM does for an index expression.  Code that is attached to the table, of
 * a trigger say, cannot change role, and leaves no setting changed.  Deferred
 * constraints would be checked at commit, when we are no longer the owner, so
 * they are checked at once.
 *
 * The triggers fire, as they do when the owner types the same: so the TRIGGER
 * privilege on a table is for those whom its owner trusts.
 */
static void
run_as_owner(Relation rel, const char *sql, int expected)
{
	SPIExecuteOptions options = {.params = makeParamList(0)};
	Oid			userid;
	int			sec_context;
	int			nestlevel;

	GetUserIdAndSecContext(&userid, &sec_context);
	if (!can_act_as(userid, rel->rd_rel->relowner))
		ereport(ERROR,
				(errcode(ERRCODE_INSUFFICIENT_PRIVILEGE),
				 errmsg("worker cannot act as the owner of \"%s\"",
						RelationGetRelationName(rel))));
	SetUserIdAndSecContext(rel->rd_rel->relowner,
						   sec_context | SECURITY_RESTRICTED_OPERATION);
	nestlevel = NewGUCNestLevel();
	AfterTriggerSetState(makeNode(ConstraintsSetStmt));

	options.params->parserSetup = setup_parser;
	options.params->parserSetupArg = &rel->rd_id;
	pgstat_report_activity(STATE_RUNNING, sql);
	PushActiveSnapshot(GetTransactionSnapshot());
	if (SPI_execute_extended(sql, &options) != expected)
		elog(ERROR, "could not run a statement: %s", sql);
	PopActiveSnapshot();

	/* After an error, the rollback does the same. */
	AtEOXact_GUC(false, nestlevel);
	SetUserIdAndSecContext(userid, sec_context);
}
