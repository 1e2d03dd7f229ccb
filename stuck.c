/* -------------------------------------------------------------------------
 *
 * stuck.c
 *		The safe way to fold, and what becomes of deltas that cannot be.
 *
 * One statement does it all.  It takes rows away and adds their sums to the
 * totals; what of them does not fit, or belongs to a key that has rows in
 * stuck, it moves to stuck.  It adds what it has deleted, and so cannot lose a
 * race.  It is run on
 *
 *		a range of counted			the safe way, in which nothing may raise
 *		sets of keys of a range		carefully, after something did
 *		sets of keys of stuck		when they are tried again
 *
 * Where stuck has rows, they are read first, by a statement that lists the rows
 * of a range by key, and for each key that is stuck a row of it there.  How long
 * that takes is nothing that a smaller share would change, so it does not count
 * in what a share may take.
 *
 * Carefully means: each set in a subtransaction, doubled when it goes through
 * and halved when it fails, until a key is alone; that key is moved to stuck.
 * Nothing is waited for: rows that somebody holds locked stay where they are.
 *
 * stuck is the only memory of what is stuck.  It survives restarts, its rows
 * count in the sum like all others, and whoever owns it may mend or delete
 * them.
 *
 * Copyright (c) 2026, worker_spi contributors
 *
 * -------------------------------------------------------------------------
 */

#include "postgres.h"

#include "access/xact.h"
#include "catalog/pg_type.h"
#include "executor/spi.h"
#include "mb/pg_wchar.h"
#include "utils/array.h"
#include "utils/builtins.h"
#include "utils/memutils.h"
#include "utils/resowner.h"
#include "fold.h"

/* -------------------------------------------------------------------------
 * The statements
 * -------------------------------------------------------------------------
 */

/*
 * Has a row a key that no index can hold?  A third of a page is more than a
 * B-tree takes; a key has in it the size that it has in its table.
 */
#define TOO_LONG "(" KEY_SIZE " > " CppAsString2(BLCKSZ) " / 3)"

/*
 * Take rows, add their sums to the totals, and move the rest to stuck.
 *
 *		$1			are they to be added, or all of them to be moved?
 *		$2			rows of stuck that tell which of their keys are there
 *		$3, $4		sqlstate and reason of what becomes stuck
 *		$5, $6		the rows: from one ctid up to, not including, another;
 *					or an array of ctids
 *
 * gone		the rows
 * sums		one for each key; since when it was stuck, if they are from stuck
 * known	the same, with what stuck says of the key; GROUP BY tells keys
 *			apart, since it takes NULLs for equal, and names no operator
 * written	the keys whose totals were written
 * rest		the sums whose keys are not among them
 * moved	the rest, each in as few rows as hold it
 */
#define FOLD(source, these, since, named) \
	"WITH gone AS (" \
	"DELETE FROM ONLY " source " WHERE " these \
	" RETURNING " KEYS_ MEASURES ", " since " AS since" \
	"), sums AS MATERIALIZED (" \
	"SELECT " KEYS_ SUMS ", count(*) AS _rows, min(since) AS since" \
	" FROM gone GROUP BY (" KEYS ") HAVING count(*) > 0" \
	"), known AS MATERIALIZED (" \
	"SELECT " KEYS_ SAME ", max(_rows) AS _rows, min(since) AS since," \
	" max(sqlstate) AS sqlstate, max(reason) AS reason," \
	" bool_or(_marked) AS _marked FROM (" \
	"SELECT " KEYS_ MEASURES ", _rows, since, CAST(NULL AS text) AS sqlstate," \
	" CAST(NULL AS text) AS reason, false AS _marked FROM sums" \
	" UNION ALL" \
	" SELECT " KEYS_ NO_SUMS ", NULL, since, sqlstate, reason, true" \
	" FROM ONLY " STUCK " WHERE ctid = ANY ($2)" \
	") AS either GROUP BY (" KEYS ") HAVING count(_rows) > 0" \
	"), written AS (" \
	"INSERT INTO " TOTALS " AS total (" COLUMNS ") OVERRIDING SYSTEM VALUE" \
	" SELECT " NEW_TOTAL " FROM known WHERE $1 AND NOT _marked AND " FITS \
	" ON CONFLICT (" ARBITER ") DO UPDATE SET " ADDED " WHERE " ADDED_FITS \
	" RETURNING " KEYS_ COUNT " AS _count" \
	"), rest AS MATERIALIZED (" \
	"SELECT " KEYS_ SAME ", max(_rows) AS _rows, min(since) AS since," \
	" max(sqlstate) AS sqlstate, max(reason) AS reason," \
	" bool_or(_marked) AS _marked FROM (" \
	"SELECT " KEYS_ MEASURES ", _rows, since, sqlstate, reason, _marked," \
	" false AS _written FROM known" \
	" UNION ALL" \
	" SELECT " KEYS_ NO_SUMS ", NULL, NULL, NULL, NULL, NULL, true FROM written" \
	") AS either" \
	" WHERE (SELECT count(*) FROM written) < (SELECT count(*) FROM known)" \
	" GROUP BY (" KEYS ") HAVING NOT bool_or(_written)" \
	"), moved AS (" \
	"INSERT INTO " STUCK " (" COLUMNS ", sqlstate, reason, since)" \
	" SELECT " DELTA_ KEYS_ PART ", CASE WHEN _marked THEN sqlstate ELSE $3 END," \
	" CASE WHEN _marked THEN reason ELSE $4 END, COALESCE(since, now())" \
	" FROM rest, LATERAL (SELECT " PARTS ") AS parts (_n)," \
	" LATERAL generate_series(1, CAST(_n AS bigint)) AS part (_i)" \
	" RETURNING ctid" \
	") SELECT" \
	" (SELECT CAST(COALESCE(sum(_rows), 0) AS bigint) FROM known)," \
	" (SELECT CAST(COALESCE(sum(_rows), 0) AS bigint) FROM rest)," \
	" (SELECT count(*) FROM written)," \
	" (SELECT max(_count) FROM written)," \
	" (SELECT count(*) FROM moved)," \
	" (SELECT count(*) FROM " named ")," \
	" (SELECT array_agg(_name) FROM" \
	" (SELECT " KEY_NAME " AS _name FROM " named " LIMIT 10) AS names)"

/* The columns of what it returns. */
enum
{
	FOLD_TAKEN = 1,				/* rows that were taken */
	FOLD_LEFT,					/* those of them that were moved */
	FOLD_WRITTEN,				/* totals that were written */
	FOLD_COUNT,					/* the one total, if there are no keys */
	FOLD_MOVED,					/* rows that were written to stuck */
	FOLD_NAMED,					/* keys to be named in the log */
	FOLD_NAMES					/* the names of some of them */
};

#define NEWLY_STUCK		"rest WHERE since IS NULL AND NOT _marked"
#define NO_LONGER_STUCK	"written"

static const char fold_range[] =
FOLD(COUNTED, "ctid >= $5 AND ctid < $6",
	 "CAST(NULL AS timestamp with time zone)", NEWLY_STUCK);

static const char fold_set[] =
FOLD(COUNTED, "ctid = ANY ($5)",
	 "CAST(NULL AS timestamp with time zone)", NEWLY_STUCK);

static const char fold_stuck_set[] =
FOLD(STUCK, "ctid = ANY ($5)", "since", NO_LONGER_STUCK);

/*
 * Move the rows of a range, $5 to $6, whose keys no index can hold.  Those that
 * somebody has locked are left.  They are moved as they are: to compare such
 * keys, or only to hash them, would take more than all the rest.
 */
static const char move_long_keys[] =
"WITH gone AS ("
"DELETE FROM ONLY " COUNTED " WHERE ctid = ANY (ARRAY("
"SELECT ctid FROM ONLY " COUNTED " WHERE ctid >= $5 AND ctid < $6 AND " TOO_LONG
" FOR UPDATE SKIP LOCKED)) RETURNING " KEYS_ MEASURES
"), moved AS ("
"INSERT INTO " STUCK " (" COLUMNS ", sqlstate, reason, since)"
" SELECT " DELTA_ KEYS_ MEASURES ", $3, $4, now() FROM gone RETURNING ctid"
") SELECT (SELECT count(*) FROM gone), (SELECT count(*) FROM gone),"
" CAST(0 AS bigint), CAST(NULL AS bigint),"
" (SELECT count(*) FROM moved), (SELECT count(*) FROM gone),"
" (SELECT array_agg(_name) FROM"
" (SELECT " KEY_NAME " AS _name FROM gone LIMIT 10) AS names)";

/*
 * The keys of rows, each with its rows, and the first that it has in stuck, if
 * $1 is true.
 */
#define LIST(rows) \
	"SELECT array_agg(_tid) FILTER (WHERE _tid IS NOT NULL), min(_marked)," \
	" CAST(NULL AS text), false FROM (" \
	"SELECT " KEYS_ "_tid, CAST(NULL AS tid) AS _marked FROM " rows \
	" UNION ALL" \
	" SELECT " KEYS_ "NULL, ctid FROM ONLY " STUCK \
	" WHERE $1 AND ctid IS NOT NULL AND NOT " TOO_LONG \
	") AS either GROUP BY (" KEYS ") HAVING count(_tid) > 0"

/* Those of a range, $2 to $3. */
static const char list_range[] =
LIST("(SELECT " KEYS_ "ctid AS _tid FROM ONLY " COUNTED
	 " WHERE ctid >= $2 AND ctid < $3) AS these");

/*
 * The same of the rows that nobody else has locked; from now on we have.  And,
 * as skipped, the rows that somebody has locked, or deleted meanwhile.
 */
static const char list_unlocked[] =
"WITH locked AS MATERIALIZED ("
"SELECT " KEYS_ "ctid AS _tid FROM ONLY " COUNTED
" WHERE ctid >= $2 AND ctid < $3 FOR UPDATE SKIP LOCKED"
") " LIST("locked")
" UNION ALL"
" SELECT array_agg(ctid), NULL, NULL, true FROM ("
"SELECT ctid FROM ONLY " COUNTED " WHERE ctid >= $2 AND ctid < $3"
" EXCEPT SELECT _tid FROM locked"
") AS skipped HAVING count(*) > 0";

/*
 * The keys of stuck whose first rows are in a range, each with all its rows,
 * wherever they are, and why it is stuck.  There is no use in trying those that
 * no index can hold.
 */
static const char list_stuck[] =
"SELECT array_agg(ctid), CAST(NULL AS tid),"
" concat_ws(' ', max(sqlstate), max(reason)), false"
" FROM ONLY " STUCK
" WHERE NOT " TOO_LONG " GROUP BY (" KEYS ") HAVING min(ctid) >= $2 AND min(ctid) < $3";

/* Which of these rows are there, in a snapshot that is newer than the list? */
static const char count_rows[] =
"SELECT count(*) FROM ONLY " COUNTED " WHERE ctid = ANY ($1)";

/* What is stuck longest, and how many rows there are in all. */
static const char count_stuck[] =
"SELECT sqlstate, reason, count(*) OVER () FROM ONLY " STUCK
" ORDER BY since, ctid LIMIT 1";

/* -------------------------------------------------------------------------
 * Types and state
 * -------------------------------------------------------------------------
 */

#define CAREFUL_LOCK_TIMEOUT "1ms"
#define MAX_LOG_LINES		10	/* in one cycle, about keys */

/* A key on a list, with its rows. */
typedef struct ListedKey
{
	ItemPointerData *rows;
	int			nrows;
	Datum		mark;			/* of counted: its first row in stuck, or 0 */
	char	   *why;			/* of stuck: its sqlstate and reason there */
	bool		skipped;		/* no key, but rows that others have */
	WorkerError *left;			/* why it was left where it is; or NULL */
} ListedKey;

/* What is done with sets of keys. */
typedef struct SetOrder
{
	const char *sql;			/* fold_set or fold_stuck_set, for the tables */
	SPIPlanPtr	plan;			/* of that; NULL if it is run once */
	bool		from_stuck;		/* the latter? */
	bool		add;			/* or move all of them? */
	bool		rewrite;		/* even if stuck has the same rows then? */
	const WorkerError *reason;	/* of what becomes stuck */
} SetOrder;

/* A line that the log is to have when the share is committed. */
typedef struct LogLine
{
	char	   *name;			/* of the key */
	bool		over;			/* is it no longer stuck? */
	WorkerError reason;			/* if it is */
} LogLine;

static MemoryContext share_context; /* holds what the log is to say */
static LogLine lines[MAX_LOG_LINES];
static int	num_lines;			/* of this share */
static int64 num_unnamed;		/* keys of this share that get no line */

/* The same of the shares of this cycle that are committed. */
static int	lines_logged = 0;
static int64 keys_not_logged = 0;

volatile sig_atomic_t stuck_is_read = false;
volatile sig_atomic_t stuck_read_ms = 0;

static void plan_sets(SetOrder *order, const char *format);
static void run_fold(const SetOrder *order, Oid rows_type, Datum marks,
					 Datum from, Datum to);
static void read_result(const SetOrder *order, ShareResult *result);
static int	list_keys(const char *format, bool any_stuck, Position from,
					  Position to, ListedKey **keys);
static void fold_sets(ListedKey *keys, int nkeys, const SetOrder *order,
					  bool may_move, ShareResult *result);
static bool run_order(const SetOrder *order, Oid rows_type, Datum marks,
					  Datum from, Datum to, ShareResult *result,
					  WorkerError *error);
static bool run_set(const ListedKey *keys, int nkeys, const SetOrder *order,
					ShareResult *result, WorkerError *error);
static Datum tid_array(Datum *tids, int ntids);
static Datum rows_of(const ListedKey *keys, int nkeys);
static Datum marks_of(const ListedKey *keys, int nkeys);
static void set_overflow(const CountedTables *tables, WorkerError *error);

/* -------------------------------------------------------------------------
 * What fold.c calls
 * -------------------------------------------------------------------------
 */

/* Once per process. */
void
stuck_init(void)
{
	share_context = AllocSetContextCreate(TopMemoryContext,
										  "worker_spi stuck keys",
										  ALLOCSET_DEFAULT_SIZES);
}

/* A share begins: what the last one was about to say is forgotten. */
void
stuck_begin_share(void)
{
	MemoryContextReset(share_context);
	num_lines = num_unnamed = 0;
	stuck_is_read = false;
	stuck_read_ms = 0;
}

/*
 * Move the rows of a range whose keys no index can hold, before anything else
 * is done with the range.
 *
 *		carefully	if they cannot even be moved, leave them
 *
 * Such a key is stored out of line, so it costs nothing to see that there is
 * none.
 */
void
stuck_move_long_keys(Position from, Position to, bool carefully,
					 ShareResult *result)
{
	WorkerError too_long = {
		.sqlstate = ERRCODE_PROGRAM_LIMIT_EXCEEDED,
		.message = "key is too long for an index row"
	};
	WorkerError error;
	SetOrder	order = {.sql = table_statement(move_long_keys),.reason = &too_long};
	ItemPointerData bounds[2];
	Datum		range[] = {
		position_tid(from, &bounds[0]),
		position_tid(to, &bounds[1])
	};

	if (!carefully)
	{
		run_fold(&order, TIDOID, tid_array(NULL, 0), range[0], range[1]);
		read_result(&order, result);
	}
	else if (!run_order(&order, TIDOID, tid_array(NULL, 0), range[0], range[1],
						result, &error))
		result->unmoved_error = error;
}

/*
 * The safe way: fold the rows of counted from one place up to, not including,
 * another, all at once; if stuck may have rows, as one set of keys.  Rows that
 * are inserted while it is listed are left for the next cycle.
 *
 *		any_stuck	may stuck have rows?
 *
 * What does not fit, and what joins a key that is stuck, is moved and raises
 * nothing.  Whatever does raise is the caller's to judge.
 */
void
stuck_fold_range(const CountedTables *tables, Position from, Position to,
				 bool any_stuck, ShareResult *result)
{
	WorkerError overflow;
	SetOrder	order = {.add = true,.reason = &overflow};

	set_overflow(tables, &overflow);
	if (any_stuck)
	{
		ListedKey  *keys;
		int			nkeys = list_keys(list_range, true, from, to, &keys);
		Datum		rows = rows_of(keys, nkeys);

		order.sql = table_statement(fold_set);
		run_fold(&order, TIDARRAYOID, marks_of(keys, nkeys), rows, rows);
	}
	else
	{
		ItemPointerData bounds[2];

		order.sql = table_statement(fold_range);
		run_fold(&order, TIDOID, tid_array(NULL, 0),
				 position_tid(from, &bounds[0]), position_tid(to, &bounds[1]));
	}
	read_result(&order, result);
}

/* Can an error that is raised while rows are folded be the fault of a key? */
bool
stuck_is_key_error(int sqlstate)
{
	switch (ERRCODE_TO_CATEGORY(sqlstate))
	{
		case ERRCODE_CONNECTION_EXCEPTION:
		case ERRCODE_INVALID_TRANSACTION_STATE:
		case ERRCODE_TRANSACTION_ROLLBACK:
		case ERRCODE_INSUFFICIENT_RESOURCES:
		case ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE:
		case ERRCODE_OPERATOR_INTERVENTION:
		case ERRCODE_SYSTEM_ERROR:
		case ERRCODE_INTERNAL_ERROR:
			return false;
	}
	return true;
}

/*
 * Fold a range carefully, and wait for nothing.
 *
 *		may_move	may a key that fails be moved?  If not, it is left where
 *					it is unless others go through: it may be the table's
 *					fault.
 *
 * Raises only what is no key's fault.
 */
void
stuck_fold_carefully(const CountedTables *tables, Position from, Position to,
					 bool any_stuck, bool may_move, ShareResult *result)
{
	WorkerError overflow;
	SetOrder	order = {.add = true,.reason = &overflow};
	SetOrder	join;
	ListedKey  *keys;
	ListedKey  *marked;
	ListedKey  *skipped = NULL;
	int			nkeys;
	int			nfree = 0;
	int			nmarked = 0;

	set_overflow(tables, &overflow);
	table_set("lock_timeout", CAREFUL_LOCK_TIMEOUT);
	nkeys = list_keys(list_unlocked, any_stuck, from, to, &keys);
	marked = palloc(sizeof(ListedKey) * Max(nkeys, 1));
	for (int i = 0; i < nkeys; i++)
	{
		if (keys[i].skipped)
		{
			skipped = palloc(sizeof(ListedKey));
			*skipped = keys[i];
		}
		else if (keys[i].mark)
			marked[nmarked++] = keys[i];
		else
			keys[nfree++] = keys[i];
	}
	plan_sets(&order, fold_set);
	fold_sets(keys, nfree, &order, may_move, result);

	/* Those whose keys are stuck join what is there. */
	join = order;
	join.add = false;
	fold_sets(marked, nmarked, &join, true, result);

	/* Were rows skipped that are still there?  Then somebody holds them. */
	if (skipped)
	{
		Oid			type = TIDARRAYOID;
		Datum		rows = rows_of(skipped, 1);

		table_run(table_statement(count_rows), NULL,
				  table_params(1, &type, &rows), SPI_OK_SELECT);
		result->held |= table_int64(1) > 0;
	}
}

/*
 * Try again the keys of stuck whose first rows are in a range, with all their
 * rows.  A key that fails again keeps the time since which it is stuck.
 */
void
stuck_retry(const CountedTables *tables, Position from, Position to,
			ShareResult *result)
{
	WorkerError overflow;
	SetOrder	order = {.from_stuck = true,.add = true,.reason = &overflow};
	ListedKey  *keys;
	int			nkeys;

	set_overflow(tables, &overflow);
	table_set("lock_timeout", CAREFUL_LOCK_TIMEOUT);
	nkeys = list_keys(list_stuck, true, from, to, &keys);
	plan_sets(&order, fold_stuck_set);
	fold_sets(keys, nkeys, &order, true, result);
}

/*
 * How many rows stuck has, and, as an error, what is stuck longest.  The owner
 * may have changed what it says, so it is not taken on trust.
 */
int64
stuck_count(WorkerError *oldest)
{
	char	   *sqlstate;
	char	   *reason;
	bool		isnull;

	memset(oldest, 0, sizeof(WorkerError));
	table_run(table_statement(count_stuck), NULL, NULL, SPI_OK_SELECT);
	if (SPI_processed == 0)
		return 0;

	sqlstate = SPI_getvalue(SPI_tuptable->vals[0], SPI_tuptable->tupdesc, 1);
	reason = SPI_getvalue(SPI_tuptable->vals[0], SPI_tuptable->tupdesc, 2);
	oldest->sqlstate = ERRCODE_DATA_EXCEPTION;
	if (sqlstate && strlen(sqlstate) == 5 && strncmp(sqlstate, "00", 2) != 0 &&
		strspn(sqlstate, "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ") == 5)
		oldest->sqlstate = MAKE_SQLSTATE(sqlstate[0], sqlstate[1], sqlstate[2],
										 sqlstate[3], sqlstate[4]);
	copy_error_text(oldest->message, reason ? reason : "deltas cannot be folded");
	return DatumGetInt64(SPI_getbinval(SPI_tuptable->vals[0],
									   SPI_tuptable->tupdesc, 3, &isnull));
}

/* The share is committed: name its keys in the log, as far as a cycle may. */
void
stuck_committed(const CountedTables *tables)
{
	keys_not_logged += num_unnamed;
	for (int i = 0; i < num_lines; i++)
	{
		LogLine    *line = &lines[i];
		char	   *what = tables->has_keys ?
			psprintf("key %s of %s", line->name, tables->name) :
			psprintf("the count in %s", tables->name);

		if (lines_logged == MAX_LOG_LINES)
			keys_not_logged++;
		else if (line->over)
			ereport(LOG,
					(errmsg("%s: %s is no longer stuck",
							MyBgworkerEntry->bgw_name, what)));
		else
			ereport(LOG,
					(errmsg("%s: %s is stuck: %s (SQLSTATE %s)",
							MyBgworkerEntry->bgw_name, what, line->reason.message,
							unpack_sql_state(line->reason.sqlstate))));
		lines_logged = Min(lines_logged + 1, MAX_LOG_LINES);
	}
	num_lines = num_unnamed = 0;
}

/* A cycle is over: say how many keys it has not named. */
void
stuck_end_cycle(const char *name)
{
	int64		not_logged = keys_not_logged;

	lines_logged = keys_not_logged = 0;
	if (not_logged > 0)
		ereport(LOG,
				(errmsg("%s: the same of " INT64_FORMAT " more keys of %s",
						MyBgworkerEntry->bgw_name, not_logged, name)));
}

/* -------------------------------------------------------------------------
 * The statement that folds
 * -------------------------------------------------------------------------
 */

static void
run_fold(const SetOrder *order, Oid rows_type, Datum marks, Datum from, Datum to)
{
	const Oid	types[] = {BOOLOID, TIDARRAYOID, TEXTOID, TEXTOID, rows_type, rows_type};
	Datum		values[] = {
		BoolGetDatum(order->add),
		marks,
		CStringGetTextDatum(unpack_sql_state(order->reason->sqlstate)),
		CStringGetTextDatum(order->reason->message),
		from,
		to
	};

	table_run(order->sql, order->plan,
			  table_params(lengthof(types), types, values), SPI_OK_SELECT);
}

/*
 * Have what is done with sets planned once, since there may be many.  Only in
 * a share: a plan that was made when a table was empty would read all of it
 * when it is full.
 */
static void
plan_sets(SetOrder *order, const char *format)
{
	static const Oid types[] = {BOOLOID, TIDARRAYOID, TEXTOID, TEXTOID, TIDARRAYOID, TIDARRAYOID};
	Datum		none[lengthof(types)] = {0};

	order->sql = table_statement(format);
	order->plan = table_prepare(order->sql,
								table_params(lengthof(types), types, none));
}

/* What it has done, and what the log is to say of it. */
static void
read_result(const SetOrder *order, ShareResult *result)
{
	bool		isnull;
	Datum		names;
	Datum	   *elements = NULL;
	int			nelements = 0;
	MemoryContext caller_context;

	result->rows += table_int64(FOLD_TAKEN) - table_int64(FOLD_LEFT);
	result->moved += table_int64(FOLD_MOVED);
	if (table_int64(FOLD_WRITTEN) > 0)
	{
		result->totals += table_int64(FOLD_WRITTEN);
		result->count = table_int64(FOLD_COUNT);
		result->went_through = true;
	}

	names = SPI_getbinval(SPI_tuptable->vals[0], SPI_tuptable->tupdesc,
						  FOLD_NAMES, &isnull);
	if (!isnull)
		deconstruct_array(DatumGetArrayTypeP(names), TEXTOID, -1, false,
						  TYPALIGN_INT, &elements, NULL, &nelements);
	num_unnamed += table_int64(FOLD_NAMED);
	for (int i = 0; i < nelements && num_lines < MAX_LOG_LINES; i++)
	{
		caller_context = MemoryContextSwitchTo(share_context);
		lines[num_lines].name = TextDatumGetCString(elements[i]);
		MemoryContextSwitchTo(caller_context);
		lines[num_lines].over = order->from_stuck;
		lines[num_lines].reason = *order->reason;
		num_lines++;
		num_unnamed--;
	}
}

/* The error that the server would raise if a sum did not fit. */
static void
set_overflow(const CountedTables *tables, WorkerError *error)
{
	memset(error, 0, sizeof(WorkerError));
	error->sqlstate = ERRCODE_NUMERIC_VALUE_OUT_OF_RANGE;
	strlcpy(error->message, tables->overflow, sizeof(error->message));
}

/* -------------------------------------------------------------------------
 * Sets of keys
 * -------------------------------------------------------------------------
 */

/*
 * List keys with their rows, by one of the statements for that.  Returns how
 * many there are.
 *
 *		any_stuck	does that read stuck?
 */
static int
list_keys(const char *format, bool any_stuck, Position from, Position to,
		  ListedKey **keys)
{
	static const Oid types[] = {BOOLOID, TIDOID, TIDOID};
	ItemPointerData bounds[2];
	Datum		values[] = {
		BoolGetDatum(any_stuck),
		position_tid(from, &bounds[0]),
		position_tid(to, &bounds[1])
	};
	TimestampTz start = GetCurrentTimestamp();
	TupleDesc	desc;

	stuck_is_read = any_stuck;
	table_run(table_statement(format), NULL,
			  table_params(lengthof(types), types, values), SPI_OK_SELECT);
	if (any_stuck)
		stuck_read_ms += (GetCurrentTimestamp() - start) / 1000;
	stuck_is_read = false;
	desc = SPI_tuptable->tupdesc;
	*keys = palloc0(sizeof(ListedKey) * Max(SPI_processed, 1));
	for (uint64 i = 0; i < SPI_processed; i++)
	{
		HeapTuple	tuple = SPI_tuptable->vals[i];
		ListedKey  *key = &(*keys)[i];
		bool		isnull;
		ArrayType  *rows = DatumGetArrayTypeP(SPI_getbinval(tuple, desc, 1, &isnull));

		/* Elements of an array stand one behind the other. */
		key->rows = (ItemPointerData *) ARR_DATA_PTR(rows);
		key->nrows = ArrayGetNItems(ARR_NDIM(rows), ARR_DIMS(rows));
		key->mark = SPI_getbinval(tuple, desc, 2, &isnull);
		key->why = SPI_getvalue(tuple, desc, 3);
		key->skipped = DatumGetBool(SPI_getbinval(tuple, desc, 4, &isnull));
	}
	return SPI_processed;
}

static Datum
tid_array(Datum *tids, int ntids)
{
	return PointerGetDatum(construct_array(tids, ntids, TIDOID,
										   sizeof(ItemPointerData), false,
										   TYPALIGN_SHORT));
}

/* All rows of these keys, as an array. */
static Datum
rows_of(const ListedKey *keys, int nkeys)
{
	int			nrows = 0;
	Datum	   *rows;

	for (int i = 0; i < nkeys; i++)
		nrows += keys[i].nrows;
	rows = palloc(sizeof(Datum) * nrows);
	nrows = 0;
	for (int i = 0; i < nkeys; i++)
		for (int j = 0; j < keys[i].nrows; j++)
			rows[nrows++] = PointerGetDatum(&keys[i].rows[j]);
	return tid_array(rows, nrows);
}

/* The first rows that these keys have in stuck. */
static Datum
marks_of(const ListedKey *keys, int nkeys)
{
	Datum	   *marks = palloc(sizeof(Datum) * nkeys);
	int			nmarks = 0;

	for (int i = 0; i < nkeys; i++)
		if (keys[i].mark)
			marks[nmarks++] = keys[i].mark;
	return tid_array(marks, nmarks);
}

/*
 * Do something with some rows in a subtransaction, and count what that does in
 * result.  Returns false if a key's error came of it, with the error.
 *
 * What is tried again and is not folded would leave as many rows in stuck as
 * there were: then all is as well as undone.
 */
static bool
run_order(const SetOrder *order, Oid rows_type, Datum marks, Datum from, Datum to,
		  ShareResult *result, WorkerError *error)
{
	MemoryContext caller_context = CurrentMemoryContext;
	ResourceOwner caller_owner = CurrentResourceOwner;
	volatile bool done = false;

	BeginInternalSubTransaction(NULL);
	MemoryContextSwitchTo(caller_context);
	PG_TRY();
	{
		run_fold(order, rows_type, marks, from, to);
		if (!order->from_stuck || order->rewrite ||
			table_int64(FOLD_WRITTEN) > 0 ||
			table_int64(FOLD_MOVED) < table_int64(FOLD_TAKEN))
		{
			read_result(order, result);
			ReleaseCurrentSubTransaction();
		}
		else
			RollbackAndReleaseCurrentSubTransaction();
		done = true;
	}
	PG_CATCH();
	{
		ErrorData  *edata;

		MemoryContextSwitchTo(caller_context);
		edata = CopyErrorData();
		FlushErrorState();
		RollbackAndReleaseCurrentSubTransaction();
		MemoryContextSwitchTo(caller_context);
		CurrentResourceOwner = caller_owner;
		if (!stuck_is_key_error(edata->sqlerrcode) &&
			edata->sqlerrcode != ERRCODE_LOCK_NOT_AVAILABLE)
			ReThrowError(edata);
		copy_error(error, edata);
	}
	PG_END_TRY();
	MemoryContextSwitchTo(caller_context);
	CurrentResourceOwner = caller_owner;
	return done;
}

/* The same with the rows of these keys. */
static bool
run_set(const ListedKey *keys, int nkeys, const SetOrder *order,
		ShareResult *result, WorkerError *error)
{
	Datum		rows = rows_of(keys, nkeys);

	return run_order(order, TIDARRAYOID, marks_of(keys, nkeys), rows, rows,
					 result, error);
}

/*
 * Move a key that cannot be folded to stuck, or leave it there with why it has
 * failed this time, in as few rows as hold it.
 */
static void
move_key(ListedKey *key, const SetOrder *order, const WorkerError *reason,
		 ShareResult *result)
{
	SetOrder	move = *order;
	WorkerError error;

	move.add = false;
	move.reason = reason;
	move.rewrite = key->why &&
		strcmp(key->why, psprintf("%s %s", unpack_sql_state(reason->sqlstate),
								  reason->message)) != 0;
	if (run_set(key, 1, &move, result, &error) || order->from_stuck)
		return;
	if (error.sqlstate == ERRCODE_LOCK_NOT_AVAILABLE)
		result->held = true;
	else if (result->unmoved_error.sqlstate == 0)
		result->unmoved_error = error;
}

/*
 * A key has failed alone.  If nothing has gone through yet, it may be the
 * table's fault, as long as all fail alike: leave the key until it is known.
 */
static void
key_failed(ListedKey *key, const SetOrder *order, const WorkerError *error,
		   bool may_move, ShareResult *result)
{
	if (error->sqlstate == ERRCODE_LOCK_NOT_AVAILABLE)
		result->held |= !order->from_stuck;
	else if (!order->add)
	{
		if (result->unmoved_error.sqlstate == 0)
			result->unmoved_error = *error;
	}
	else if (may_move || result->went_through)
		move_key(key, order, error, result);
	else
	{
		key->left = palloc(sizeof(WorkerError));
		*key->left = *error;
		if (result->left_error.sqlstate == 0)
			result->left_error = *error;
	}
}

/*
 * Fold keys, set by set.  When a set has failed and the first part of it goes
 * through, what fails is in the rest of it, so no more than that is tried.
 */
static void
fold_sets(ListedKey *keys, int nkeys, const SetOrder *order, bool may_move,
		  ShareResult *result)
{
	MemoryContext set_context = AllocSetContextCreate(CurrentMemoryContext,
													  "worker_spi set",
													  ALLOCSET_DEFAULT_SIZES);
	int			next = 0;
	int			size = 1;
	int			bad_until = 0;	/* something from next to here fails */
	WorkerError error;

	while (next < nkeys)
	{
		int			n = Min(size, nkeys - next);
		MemoryContext caller_context = MemoryContextSwitchTo(set_context);
		bool		done = run_set(&keys[next], n, order, result, &error);

		/* Another session may just have made the same total. */
		if (!done && n == 1 && error.sqlstate == ERRCODE_UNIQUE_VIOLATION)
			done = run_set(&keys[next], n, order, result, &error);
		MemoryContextSwitchTo(caller_context);
		MemoryContextReset(set_context);

		if (done)
		{
			next += n;
			size = next < bad_until ? Max((bad_until - next) / 2, 1) : size * 2;
		}
		else if (n > 1)
		{
			bad_until = next + n;
			size = n / 2;
		}
		else
		{
			may_move |= result->left_error.sqlstate != 0 &&
				result->left_error.sqlstate != error.sqlstate;
			key_failed(&keys[next], order, &error, may_move, result);
			next++;
			size = 1;
		}
	}

	/* Others have gone through, so it is the fault of these. */
	for (int i = 0; i < nkeys; i++)
	{
		if (keys[i].left && (may_move || result->went_through))
			move_key(&keys[i], order, keys[i].left, result);
		else if (keys[i].left)
			result->left = true;
	}
}
