/* -------------------------------------------------------------------------
 *
 * fold.c
 *		The job of this worker: fold the deltas of a table into its totals.
 *
 * The rest of worker_spi could run any job.  This file is what makes it one
 * that counts: its statements, the table they work on, and what is to be done
 * about rows that cannot be folded.  worker.c calls its three functions and
 * looks after the process; what it must know comes back in JobProgress.
 *
 * A cycle is a series of short transactions, "shares", whatever the backlog.
 * Most shares fold one range of blocks: they sum its deltas, add the sums to
 * the totals and delete the deltas, all under one snapshot.  A cycle that
 * finds no delta is one read-only scan: no transaction id, no WAL.
 *
 * What cannot be folded is left out, and the rest is folded all the same:
 *
 *	1.	A sum that does not fit is found by the statement that adds it, and
 *		raises nothing.  Any other error of the data rolls its share back; the
 *		range is then halved until the error is in one row.
 *	2.	That row stands for its key (or for itself, if the table has none).  It
 *		is remembered, and the following statements leave its key out.
 *	3.	When the ranges are done, each key left out is judged with all its
 *		deltas together, wherever they are.  What fails then is stuck.
 *	4.	A cycle that is to retry judges all that is stuck; others leave it.
 *
 * Tries and memory are bounded.  Beyond the bounds, whole ranges are set aside
 * until the next retry.
 *
 * Copyright (c) 2026, worker_spi contributors
 *
 * -------------------------------------------------------------------------
 */

#include "postgres.h"

#include <math.h>

#include "access/genam.h"
#include "access/htup_details.h"
#include "access/relation.h"
#include "access/transam.h"
#include "access/xact.h"
#include "catalog/namespace.h"
#include "catalog/pg_am.h"
#include "catalog/pg_collation.h"
#include "catalog/pg_language.h"
#include "catalog/pg_namespace.h"
#include "catalog/pg_operator.h"
#include "catalog/pg_proc.h"
#include "catalog/pg_trigger.h"
#include "catalog/pg_type.h"
#include "commands/async.h"
#include "commands/defrem.h"
#include "commands/trigger.h"
#include "executor/spi.h"
#include "fmgr.h"
#include "mb/pg_wchar.h"
#include "miscadmin.h"
#include "nodes/makefuncs.h"
#include "nodes/nodeFuncs.h"
#include "optimizer/optimizer.h"
#include "optimizer/plancat.h"
#include "parser/parse_param.h"
#include "pgstat.h"
#include "portability/instr_time.h"
#include "rewrite/rewriteHandler.h"
#include "storage/bufmgr.h"
#include "storage/freespace.h"
#include "storage/procarray.h"
#include "utils/array.h"
#include "utils/builtins.h"
#include "utils/fmgrprotos.h"
#include "utils/guc.h"
#include "utils/inval.h"
#include "utils/lsyscache.h"
#include "utils/memutils.h"
#include "utils/rel.h"
#include "utils/snapmgr.h"
#include "utils/syscache.h"
#include "utils/typcache.h"
#include "worker_spi.h"

/* -------------------------------------------------------------------------
 * The statements
 * -------------------------------------------------------------------------
 */

/*
 * Each is written once, for tables with any keys and measures: {...} stands
 * for a fragment, below, or for an operator of pg_catalog, so that no operator
 * of a user's can take its place.  Their parameters:
 *
 *		$1, $2	the range: from this ctid up to, not including, that one
 *		$3		ctids of rows that stand for what is stuck
 *		$4		a transaction id: a total written before it is new to the cycle
 *		$5		a number of rows
 */
typedef enum FoldStatement
{
	FOLD_PROBE,
	FOLD_MANY,
	FOLD_ADD,
	FOLD_DELETE,
	FOLD_PREFIX,
	FOLD_COUNT,
	FOLD_COUNT_STUCK,
	FOLD_NAMES,
	FOLD_MOVE,
	NUM_FOLD_STATEMENTS
} FoldStatement;

#define NAME_LENGTH		60		/* of a key in the log */

/*
 * The ctids of deltas whose keys are among some that are marked, or are not.
 * GROUP BY tells keys apart, since it takes NULLs for equal, and = does not.
 */
#define BY_KEYS(ctids, deltas, marked_keys, condition) \
	"SELECT " ctids " FROM (" \
	"SELECT {keys as}t.ctid AS tid, false AS marked" \
	" FROM ONLY {table} AS t WHERE {is delta} AND " deltas \
	" UNION ALL" \
	" SELECT " marked_keys \
	") AS either GROUP BY ({k}) HAVING " condition

#define OF_KEYS(condition) \
	"t.ctid {=} ANY (ARRAY(" \
	BY_KEYS("pg_catalog.unnest(pg_catalog.array_agg(tid))", "{in range}", \
			"{keys as}NULL, true FROM ONLY {table} AS t" \
			" WHERE {is delta} AND t.ctid {=} ANY ($3)", condition) "))"

/* Deltas that stand for the keys whose sums do not fit. */
#define OF_UNFIT(ctids, deltas) \
	BY_KEYS(ctids, deltas, "{k, }NULL, true FROM merged WHERE NOT fits", \
			"pg_catalog.bool_or(marked)")

static const char *const statements[NUM_FOLD_STATEMENTS] = {
	/* Find the first delta from $1 on. */
	[FOLD_PROBE] =
	"SELECT t.ctid FROM ONLY {table} AS t"
	" WHERE {is delta} AND t.ctid {>=} $1 LIMIT 1",

	/* Are there more than $5 deltas in a range? */
	[FOLD_MANY] =
	"SELECT t.ctid FROM ONLY {table} AS t"
	" WHERE {is delta} AND {in range} OFFSET $5 LIMIT 1",

	/*
	 * Add deltas to the totals, but for sums that do not fit.  The join is a
	 * full one, though totals without a sum are of no use, since no planner
	 * can make a nested loop of that; from there on a total is found by its
	 * ctid.
	 */
	[FOLD_ADD] =
	"WITH sums AS ("
	"SELECT {keys as}{sums as}pg_catalog.count(*) AS rows"
	" FROM ONLY {table} AS t WHERE {these deltas} GROUP BY ({keys})"
	"), totals AS ("
	"SELECT {total keys}{total measures}total.ctid AS tid,"
	" pg_catalog.age(total.xmin) {>} pg_catalog.age($4) AS fresh"
	" FROM ONLY {table} AS total WHERE {these totals} OFFSET 0"
	"), merged AS MATERIALIZED ("
	"SELECT *, {fits} AS fits FROM ("
	"SELECT {k, }{new totals}rows, tid, COALESCE(fresh, true) AS fresh"
	" FROM sums FULL JOIN totals ON true{same keys}"
	" WHERE COALESCE(rows, 0) {>} 0) AS m"
	"), updated AS ("
	"UPDATE ONLY {table} AS total SET {set} FROM merged"
	" WHERE total.ctid {=} merged.tid AND merged.fits"
	" RETURNING total.ctid"
	"), inserted AS ("
	"INSERT INTO {table} AS total ({key columns}type, {measure columns})"
	" OVERRIDING SYSTEM VALUE"
	" SELECT {k, }'total', {new values} FROM merged"
	" WHERE merged.tid IS NULL AND merged.fits"
	" RETURNING total.ctid"
	") SELECT"
	" CAST(pg_catalog.sum(rows) FILTER (WHERE fits) AS pg_catalog.int8),"
	" pg_catalog.count(*) FILTER (WHERE fits),"
	" (SELECT pg_catalog.count(*) FROM updated)"
	" {+} (SELECT pg_catalog.count(*) FROM inserted),"
	" pg_catalog.count(*) FILTER (WHERE fits AND fresh),"
	" CAST(pg_catalog.max({new value}) FILTER (WHERE fits) AS pg_catalog.int8),"
	" CASE WHEN NOT pg_catalog.bool_and(fits) THEN ARRAY({unfit}) END"
	" FROM merged",

	/* Delete the same deltas; under the same snapshot they are the same. */
	[FOLD_DELETE] =
	"DELETE FROM ONLY {table} AS t WHERE {these deltas}",

	/* Without keys: the last row up to which the sum of a range fits. */
	[FOLD_PREFIX] =
	"SELECT pg_catalog.max(tid) FROM (SELECT t.ctid AS tid, {running sums}"
	" FROM ONLY {table} AS t LEFT JOIN ONLY {table} AS total ON {is total}"
	" WHERE {these deltas}"
	" WINDOW w AS (ORDER BY t.ctid)) AS m WHERE {fits}",

	/* How many deltas a range has, how many are stuck, and their keys. */
	[FOLD_COUNT] =
	"SELECT pg_catalog.count(*) FROM ONLY {table} AS t"
	" WHERE {is delta} AND {in range}",
	[FOLD_COUNT_STUCK] =
	"SELECT pg_catalog.count(*) FROM ONLY {table} AS t WHERE {these deltas}",
	[FOLD_NAMES] =
	"SELECT t.ctid, pg_catalog.left(CAST(ROW({keys}) AS pg_catalog.text), " CppAsString2(NAME_LENGTH) ")"
	" FROM ONLY {table} AS t WHERE t.ctid {=} ANY ($3) AND {is delta}",

	/* Write at most $5 totals anew, of those that stand from $1 on. */
	[FOLD_MOVE] =
	"WITH merged AS ("
	"DELETE FROM ONLY {table} AS t WHERE t.ctid {=} ANY (ARRAY("
	"SELECT total.ctid FROM ONLY {table} AS total"
	" WHERE {is total} AND total.ctid {>=} $1 LIMIT $5))"
	" RETURNING {keys as}{measures as}"
	") INSERT INTO {table} AS total ({key columns}type, {measure columns})"
	" OVERRIDING SYSTEM VALUE"
	" SELECT {k, }'total', {new values} FROM merged"
	" RETURNING total.ctid",
};

/* What a statement is built for: each bit includes some fragments. */
#define ALL_ROWS		0x01	/* neither of the next two */
#define BUT_STUCK		0x02	/* leave out what is stuck */
#define ONLY_STUCK		0x04	/* nothing but what is stuck */
#define FEW_KEYS		0x08	/* look each total up in the index */
#define MANY_KEYS		0x10	/* read all totals */
#define WITH_KEYS		0x20
#define WITHOUT_KEYS	0x40
#define NULL_KEYS		0x80	/* some key may be NULL */

/* What a column is; a fragment may be there for some columns only. */
#define KEY				0x01
#define NULLABLE		0x02	/* a key that may be NULL */
#define JOINABLE		0x04	/* a key by whose = a join can hash */
#define UNJOINABLE		0x08	/* a key that may be NULL, or has no such = */
#define MEASURE			0x10
#define SUMMED			0x20	/* a measure that may not fit */
#define EXTREME			0x40	/* a measure that always does */
#define VALUE			0x80	/* the column of that name */

/*
 * A fragment without columns is there once; one with columns is there for each
 * column that has all these flags.  In it, %c is the column's name, %i its
 * number, %= its equality operator, %t its type, %l and %h the lowest and
 * highest value of that, %a is the aggregate of its measure, and %f the function
 * of two values that does the same.
 */
static const struct Fragment
{
	const char *name;
	int			built_for;		/* bits that must all be set */
	int			columns;		/* flags that a column must all have */
	const char *text;
	const char *separator;
}			fragments[] =

{
	/* in COALESCE, so that no index on the deltas orders what it finds */
	{"is delta", 0, 0, "COALESCE(t.type {<>} 'total'::pg_catalog.text, true)", ""},
	{"is total", 0, 0, "total.type {=} 'total'::pg_catalog.text", ""},
	{"in range", 0, 0, "t.ctid {>=} $1 AND t.ctid {<} $2", ""},

	/*
	 * lists of columns: of deltas and their sums, of totals, and then of what
	 * is made of both
	 */
	{"keys", 0, KEY, "t.%c", ", "},
	{"keys as", 0, KEY, "t.%c AS k%i, ", ""},
	{"key columns", 0, KEY, "%c, ", ""},
	{"measure columns", 0, MEASURE, "%c", ", "},
	{"sums as", 0, MEASURE, "pg_catalog.%a(t.%c) AS v%i, ", ""},
	{"measures as", 0, MEASURE, "t.%c AS n%i", ", "},
	{"total keys", 0, KEY, "total.%c AS total_k%i, ", ""},
	{"total measures", 0, MEASURE, "total.%c AS total_v%i, ", ""},
	{"k", 0, KEY, "k%i", ", "},
	{"k, ", 0, KEY, "k%i, ", ""},
	{"new totals", 0, SUMMED, "COALESCE(v%i, 0) {+} COALESCE(total_v%i, 0) AS n%i, ", ""},
	{"new totals", 0, EXTREME, "%f(v%i, total_v%i) AS n%i, ", ""},
	{"new values", 0, MEASURE, "CAST(merged.n%i AS %t)", ", "},
	{"new value", 0, VALUE, "n%i", ""},
	{"set", 0, MEASURE, "%c = CAST(merged.n%i AS %t)", ", "},
	{"fits", 0, SUMMED, "m.n%i {>=} %l AND m.n%i {<=} %h", " AND "},
	{"running sums", 0, SUMMED,
	"COALESCE(total.%c, 0) {+} COALESCE(pg_catalog.sum(t.%c) OVER w, 0) AS n%i", ", "},

	/*
	 * Arrays of one NULL are equal, and a full join takes arrays of all that
	 * can be sorted, whatever its = says of joins.  Where keys are arrays,
	 * that of an empty one equals that of NULL.
	 */
	{"same keys", 0, JOINABLE, " AND k%i %= total_k%i", ""},
	{"same keys", 0, UNJOINABLE,
		" AND ARRAY[k%i] {=} ARRAY[total_k%i]"
	" AND (k%i IS NULL) {=} (total_k%i IS NULL)", ""},

	/* what is left out for it: one delta of a key, or all that were */
	{"unfit", WITHOUT_KEYS, 0, "SELECT $1", ""},
	{"unfit", WITH_KEYS | ALL_ROWS, 0, OF_UNFIT("pg_catalog.min(tid)", "{these deltas}"), ""},
	{"unfit", WITH_KEYS | BUT_STUCK, 0, OF_UNFIT("pg_catalog.min(tid)", "{these deltas}"), ""},
	{"unfit", WITH_KEYS | ONLY_STUCK, 0,
		OF_UNFIT("pg_catalog.unnest(pg_catalog.array_agg(tid) FILTER (WHERE NOT marked))",
				 "t.ctid {=} ANY ($3)"), ""},

	/*
	 * A row that is stuck stands for its key, or else for itself.  Without
	 * keys, all rows but one are deltas; to tell that one by its ctid, and
	 * not by a text, takes a tenth off the fold.
	 */
	{"these deltas", ALL_ROWS | WITH_KEYS, 0, "{is delta} AND {in range}", ""},
	{"these deltas", ALL_ROWS | WITHOUT_KEYS, 0,
		"{in range} AND t.ctid {<>} (SELECT COALESCE(pg_catalog.min(total.ctid), '(0,0)')"
	" FROM ONLY {table} AS total WHERE {is total})", ""},
	{"these deltas", BUT_STUCK | WITH_KEYS, 0, OF_KEYS("NOT pg_catalog.bool_or(marked)"), ""},
	{"these deltas", ONLY_STUCK | WITH_KEYS, 0, OF_KEYS("pg_catalog.bool_or(marked)"), ""},
	{"these deltas", BUT_STUCK | WITHOUT_KEYS, 0,
	"{is delta} AND {in range} AND NOT t.ctid {=} ANY (SELECT pg_catalog.unnest($3))", ""},
	{"these deltas", ONLY_STUCK | WITHOUT_KEYS, 0, "{is delta} AND t.ctid {=} ANY ($3)", ""},

	/*
	 * = finds no NULL, and what finds it, no index can do: totals with NULL
	 * in some key are all read, if there is such a delta
	 */
	{"these totals", WITHOUT_KEYS, 0, "{is total}", ""},
	{"these totals", WITH_KEYS | MANY_KEYS, 0, "{is total}", ""},
	{"these totals", WITH_KEYS | FEW_KEYS, 0,
		"total.ctid {=} ANY (ARRAY(SELECT found.ctid FROM sums, LATERAL ("
		"SELECT total.ctid FROM ONLY {table} AS total"
	" WHERE {is total}{looked up} OFFSET 0) AS found{null totals}))", ""},
	{"looked up", 0, KEY, " AND total.%c %= sums.k%i", ""},
	{"null totals", NULL_KEYS, 0,
		" UNION ALL SELECT total.ctid FROM ONLY {table} AS total WHERE {is total}"
	" AND ({total is null}) AND EXISTS (SELECT FROM sums WHERE {sum is null})", ""},
	{"total is null", 0, NULLABLE, "total.%c IS NOT DISTINCT FROM NULL", " OR "},
	{"sum is null", 0, NULLABLE, "k%i IS NOT DISTINCT FROM NULL", " OR "},
};

/*
 * What can be done with a measure: the default by which it is known, which
 * changes nothing, the aggregate over all deltas of a key, and what adds that
 * to a total.
 */
static const struct MeasureKind
{
	const char *neutral;
	int			flags;
	const char *aggregate;
	const char *function;
}			measure_kinds[] =

{
	{"0", SUMMED, "sum", NULL},
	{"-infinity", EXTREME, "max", "GREATEST"},
	{"infinity", EXTREME, "min", "LEAST"},
};

/* Their types. */
static const struct MeasureType
{
	Oid			oid;
	const char *name;
	const char *lowest;			/* of what is summed */
	const char *highest;
}			measure_types[] =

{
	{INT8OID, "pg_catalog.int8", "'-9223372036854775808'::pg_catalog.int8", "'9223372036854775807'::pg_catalog.int8"},
	{INT4OID, "pg_catalog.int4", "'-2147483648'::pg_catalog.int4", "'2147483647'::pg_catalog.int4"},
	{DATEOID, "pg_catalog.date", NULL, NULL},
	{TIMESTAMPOID, "pg_catalog.timestamp", NULL, NULL},
	{TIMESTAMPTZOID, "pg_catalog.timestamptz", NULL, NULL},
};

/* -------------------------------------------------------------------------
 * Types and state
 * -------------------------------------------------------------------------
 */

/*
 * How long a share is to take.  Nobody is to wait for it for long; but a key
 * that has deltas in many shares has its total written as many times, so with
 * keys they are not to be many.
 */
#define SHARE_MS			250.0
#define KEYED_SHARE_MS		350.0
#define LAST_STRETCH		0.3 /* so much longer, if that saves one */
#define TOTAL_ROWS			5.0 /* rows that cost as much as one total */
#define FIRST_ROWS			20000.0
#define MIN_ROWS			100.0	/* each may run slow code */
#define MAX_BLOCKS			16384.0 /* there may be few deltas in many */
#define SAMPLES				64	/* blocks, to see how many there are */

#define MAX_STUCK			1024	/* keys or rows that are remembered */
#define MAX_ASIDE			64	/* ranges set aside */
#define MAX_TRIES			500 /* failed shares in one cycle */
#define MAX_SEARCH_MS		20000	/* from the first failed one on */
#define MAX_LOST_RACES		10	/* in one cycle, before it fails */
#define SEARCH_LOCK_TIMEOUT	"20ms"
#define TIDY_ROWS			200000	/* a backlog; smaller ones leave no trace */
#define TIDY_LIMIT			10000	/* totals to move in one share */
#define MAX_LOG_LINES		10	/* in one cycle, about what is stuck */

/*
 * A place in the table, or in the array of what is stuck.  Rows are numbered
 * without gaps, so that half of a range is simple arithmetic.
 */
typedef uint64 Position;

#define ROWS_PER_BLOCK		(MaxHeapTuplesPerPage + 1)
#define BLOCK_START(block)	((Position) (block) * ROWS_PER_BLOCK)
#define TABLE_END			BLOCK_START(MaxBlockNumber)

/*
 * A search for what makes a range fail, by halves.  While size is 0, there is
 * none, and next is where the next range begins.
 */
typedef struct Search
{
	Position	next;			/* all before is done */
	Position	size;			/* try no more than this at once */
	Position	bad_until;		/* all from next to here fails as a whole */
} Search;

/* A column that is a key or a measure. */
typedef struct Column
{
	int			flags;			/* KEY, MEASURE, ... */
	AttrNumber	attnum;
	int			number;			/* for its aliases */
	const char *name;			/* quoted */
	const char *equals;			/* of a key: its operator, qualified */
	const struct MeasureKind *kind;
	const struct MeasureType *type;
} Column;

/* A statement has one plan for each of these choices. */
#define PLAN_NUMBER(which, built_for) \
	((which) * 6 + ((built_for) & (BUT_STUCK | ONLY_STUCK)) + \
	 (((built_for) & MANY_KEYS) ? 1 : 0))
#define NUM_FOLD_PLANS		(NUM_FOLD_STATEMENTS * 6)

/*
 * What is known of the table.  The relcache callback clears valid at any time,
 * also while the table is being looked at; the next share then looks again.
 */
typedef struct FoldTable
{
	bool		valid;			/* has nothing changed since we looked? */
	bool		ready;			/* have we looked to the end? */
	Oid			relid;
	Oid			total_index;
	int			replication_role;	/* to fold it with */
	bool		has_keys;
	int			bits;			/* what all statements are built for */
	int			ncolumns;
	Column	   *columns;
	MemoryContext context;		/* holds columns and sql */
	char	   *sql[NUM_FOLD_PLANS];
	SPIPlanPtr	plans[NUM_FOLD_PLANS];
} FoldTable;

/* A row that stands for itself, or for all deltas of its key. */
typedef struct StuckRow
{
	ItemPointerData tid;
	bool		gone;			/* found to be folded, or deleted */
	bool		logged;
	int			sqlstate;
	char	   *reason;
	char	   *name;			/* its key, as in the log; NULL if not logged */
} StuckRow;

/* A range that is left for the next retry. */
typedef struct AsideRange
{
	Position	from;
	Position	to;
	int			sqlstate;
	bool		logged;
} AsideRange;

/* Lasts until the process ends or the table gets another file. */
typedef struct StuckSet
{
	Oid			file;			/* the file that all this is about */
	MemoryContext context;		/* holds reasons and names */
	int			nrows;
	StuckRow	rows[MAX_STUCK];
	int			naside;
	AsideRange	aside[MAX_ASIDE];
	WorkerError error;			/* of the first one */
} StuckSet;

/* Some of these, for a statement. */
typedef struct TidList
{
	int			n;
	ItemPointerData tids[MAX_STUCK];
} TidList;

/* What FOLD_ADD says. */
typedef struct Sums
{
	int64		rows;			/* deltas that were added */
	int64		keys;			/* sums they made */
	int64		fresh;			/* totals that are new to this cycle */
	int64		total;			/* the greatest new one */
	TidList    *unfit;			/* rows for the sums that did not fit */
} Sums;

typedef enum CyclePhase
{
	PHASE_RANGES,				/* fold one range after the other */
	PHASE_JUDGE,				/* fold what was left out */
	PHASE_REPORT,				/* count and name what is stuck */
	PHASE_TIDY,					/* bring totals to the front of the table */
	PHASE_END
} CyclePhase;

/* A cycle, as far as it is committed; or with what this share adds to it. */
typedef struct FoldCycle
{
	bool		running;
	CyclePhase	phase;
	Position	end;			/* of the table when the cycle began */
	Position	first;			/* no delta stood before it then */
	Search		search;			/* over the table, then over the stuck set */
	int			first_suspect;	/* in the stuck set: from here on to be judged */
	TransactionId first_xid;	/* of the cycle */
	int64		rows;			/* deltas folded */
	int64		totals;			/* total rows they went to */
	int64		total;			/* the last one, for a table without keys */
	int64		left;			/* stuck deltas */
	bool		unnotified;		/* has a total changed since the last NOTIFY? */
} FoldCycle;

/* What a share is doing, for when it fails. */
typedef struct FoldShare
{
	enum
	{
		STEP_OPEN,				/* not at the rows yet: the cycle fails */
		STEP_DATA,
		STEP_COMMIT
	}			step;
	Position	from;			/* the piece that it tries */
	Position	to;
	FoldStatement statement;	/* the one that runs */
	bool		notifies;
} FoldShare;

/* What to put back when the worker stops acting as somebody else. */
typedef struct SavedIdentity
{
	Oid			userid;
	int			sec_context;
	int			guc_nestlevel;
} SavedIdentity;

static char my_schema[NAMEDATALEN];
static char my_table[2 * NAMEDATALEN];	/* for SQL, messages, notifications */
static FoldTable Counted;
static StuckSet Stuck;
static FoldCycle Cycle;
static FoldCycle LastCycle;		/* Cycle as it was before this share */
static FoldShare Share;

/* These last over shares that fail, so they are not in Cycle. */
static int	tries;				/* failed shares in this cycle */
static int	lost_races;			/* against other transactions, the same */
static instr_time search_start;
static bool notify_failed;		/* the last time, so not now */
static bool notify_failed_logged;
static bool nameless;			/* in this cycle, no key can be shown */
static int	logged_aside;		/* ranges set aside that the log knows of */

static int64 row_limit;			/* $5 of the next statement */
static bool untidy;				/* are totals to be brought to the front? */
static BlockNumber index_blocks;	/* in the index on totals */

static double share_rows;		/* deltas for one share, as was learned */
static double last_share_rows;	/* and for one that is the last */

static Relation open_table(SavedIdentity *saved);
static void begin_cycle(Relation rel, bool retry);
static bool run_phase(Relation rel);
static bool fold_range(void);
static void fold_rows(Position from, Position to);
static bool fold_suspects(void);
static void report_stuck(void);
static bool wants_tidying(void);
static bool move_totals(Relation rel);
static bool is_data_error(const WorkerError *error);
static void search_failed_share(const WorkerError *error);
static bool anything_stuck(void);
static void log_stuck(void);
static void forget_gone(void);
static void run_statement(FoldStatement which, int built_for, Position from,
						  Position to, const TidList *tids, int expected);
static int64 result_int64(int n);
static void invalidate_table(Datum arg, Oid relid);
static void run_command(const char *sql);
static void SwitchToUntrustedUser(Oid userid, SavedIdentity *saved);
static void RestoreUserContext(const SavedIdentity *saved);

/* -------------------------------------------------------------------------
 * What worker.c calls
 * -------------------------------------------------------------------------
 */

/*
 * Prepare to work on the table of worker number index.  Once per process,
 * outside any transaction.  Returns the name of the table, for the log.
 */
const char *
fold_init(int index)
{
	snprintf(my_schema, sizeof(my_schema), "schema%d", index);
	snprintf(my_table, sizeof(my_table), "%s.counted", my_schema);
	Counted.context = AllocSetContextCreate(TopMemoryContext,
											"worker_spi statements",
											ALLOCSET_DEFAULT_SIZES);
	Stuck.context = AllocSetContextCreate(TopMemoryContext,
										  "worker_spi stuck rows",
										  ALLOCSET_DEFAULT_SIZES);
	CacheRegisterRelcacheCallback(invalidate_table, (Datum) 0);
	return my_table;
}

/*
 * Do one share of a cycle.  The caller has begun a transaction, with SPI
 * connected and no snapshot yet, and commits it afterwards.  Returns true if
 * the cycle has more to do.
 */
bool
fold_some(JobProgress *progress)
{
	int64		rows_before = Cycle.running ? Cycle.rows : 0;
	SavedIdentity saved;
	Relation	rel;
	bool		more = true;

	MemSet(&Share, 0, sizeof(Share));
	LastCycle = Cycle;
	progress->rows_done = 0;

	rel = open_table(&saved);
	if (rel == NULL)
		return true;

	/* Only now, under the lock: no change to the table is missed. */
	PushActiveSnapshot(GetTransactionSnapshot());
	begin_cycle(rel, progress->retry);
	LastCycle = Cycle;

	/*
	 * Deferred triggers would fire at commit, when we are no longer the
	 * owner; the server refuses to queue them.
	 */
	if (rel->trigdesc)
		run_command("SET CONSTRAINTS ALL IMMEDIATE");

	Share.step = STEP_DATA;
	more = run_phase(rel);
	Share.step = STEP_COMMIT;

	if (!more && !anything_stuck())
	{
		Cycle.left = 0;
		Stuck.error.sqlstate = 0;
	}

	if (Cycle.rows > rows_before)
	{
		Cycle.unnotified = true;
		if (!TransactionIdIsValid(Cycle.first_xid))
			Cycle.first_xid = GetTopTransactionIdIfAny();
	}

	/* One notification for a cycle, delivered when its last share commits. */
	if (!more && Cycle.unnotified)
	{
		if (worker_spi_notify && !notify_failed)
		{
			Async_Notify("worker_spi", Counted.has_keys ? my_table :
						 psprintf("%s " INT64_FORMAT, my_table, Cycle.total));
			Share.notifies = true;
		}
		else
			Cycle.unnotified = false;
	}

	PopActiveSnapshot();
	RestoreUserContext(&saved);
	relation_close(rel, NoLock);

	progress->rows_done = Cycle.rows - rows_before;
	progress->rows_left = Cycle.left;
	progress->left_error = Stuck.error;
	return more;
}

/*
 * Hear how it went, outside a transaction: after the commit of a cycle's last
 * share (error is NULL), or after a share has failed and was rolled back.
 * Returns true if the cycle is to go on after an error.
 */
bool
fold_ended(const WorkerError *error)
{
	if (error)
	{
		Cycle = LastCycle;

		/* Somebody else has won; by now it is our turn. */
		if ((error->sqlstate == ERRCODE_T_R_SERIALIZATION_FAILURE ||
			 error->sqlstate == ERRCODE_T_R_DEADLOCK_DETECTED) &&
			lost_races++ < MAX_LOST_RACES)
			return true;

		/* The queue of notifications may be full: fold all the same. */
		if (Share.step == STEP_COMMIT && Share.notifies)
		{
			if (!notify_failed_logged)
				ereport(LOG,
						(errmsg("%s folds %s without a notification: %s",
								MyBgworkerEntry->bgw_name, my_table,
								error->message)));
			notify_failed = notify_failed_logged = true;
			return true;
		}
		if (Share.step == STEP_DATA && is_data_error(error))
		{
			search_failed_share(error);
			return true;
		}
	}
	else
	{
		if (Share.notifies)
			notify_failed_logged = Cycle.unnotified = false;
		log_stuck();
	}
	forget_gone();

	/* Even if it failed, what it had committed until then is folded. */
	if (worker_spi_log_folds && Cycle.running && Cycle.rows > 0)
	{
		if (Counted.has_keys)
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
	Cycle.running = false;
	lost_races = 0;
	return false;
}

/* -------------------------------------------------------------------------
 * A cycle: ranges first, then what was left out
 * -------------------------------------------------------------------------
 */

/* Where is this row, and which row is there? */
static Position
tid_position(const ItemPointerData *tid)
{
	return BLOCK_START(ItemPointerGetBlockNumberNoCheck(tid)) +
		ItemPointerGetOffsetNumberNoCheck(tid);
}

static void
position_tid(Position position, ItemPointerData *tid)
{
	ItemPointerSet(tid, position / ROWS_PER_BLOCK, position % ROWS_PER_BLOCK);
}

/* The ctid that row number i of what the last statement returned begins with. */
static Position
result_position(uint64 i)
{
	bool		isnull;
	Datum		tid = SPI_getbinval(SPI_tuptable->vals[i],
									SPI_tuptable->tupdesc, 1, &isnull);

	return isnull ? 0 : tid_position((ItemPointer) DatumGetPointer(tid));
}

/* Begin a cycle, or begin it again if VACUUM FULL or the like has moved all. */
static void
begin_cycle(Relation rel, bool retry)
{
	if (Cycle.running && Stuck.file == rel->rd_rel->relfilenode)
		return;
	if (Stuck.file != rel->rd_rel->relfilenode)
	{
		MemoryContextReset(Stuck.context);
		Stuck.nrows = Stuck.naside = 0;
		Stuck.error.sqlstate = 0;
		Stuck.file = rel->rd_rel->relfilenode;
		Cycle.left = 0;
		untidy = false;
	}
	if (!Cycle.running)
	{
		Cycle.running = true;
		Cycle.rows = Cycle.totals = 0;
		Cycle.first_xid = InvalidTransactionId;
		tries = 0;
		notify_failed = nameless = false;
	}
	if (retry)
	{
		Stuck.naside = 0;
		Stuck.error.sqlstate = 0;
	}
	Cycle.phase = PHASE_RANGES;
	Cycle.first = 0;
	Cycle.end = BLOCK_START(RelationGetNumberOfBlocks(rel));
	MemSet(&Cycle.search, 0, sizeof(Search));
	Cycle.first_suspect = retry ? 0 : Stuck.nrows;
}

/*
 * Do a share of the phase that the cycle is in, and go on to the next phase
 * that has something to do.  Returns false if there is none.
 */
static bool
run_phase(Relation rel)
{
	bool		more = false;

	switch (Cycle.phase)
	{
		case PHASE_RANGES:
			more = fold_range();
			break;
		case PHASE_JUDGE:
			more = fold_suspects();
			break;
		case PHASE_REPORT:
			report_stuck();
			break;
		case PHASE_TIDY:
			more = move_totals(rel);
			break;
		case PHASE_END:
			break;
	}
	while (!more && ++Cycle.phase < PHASE_END)
	{
		switch (Cycle.phase)
		{
			case PHASE_JUDGE:
				more = Cycle.first_suspect < Stuck.nrows;
				MemSet(&Cycle.search, 0, sizeof(Search));
				Cycle.search.next = Cycle.first_suspect;
				break;
			case PHASE_REPORT:
				more = anything_stuck();
				break;
			default:
				more = wants_tidying();
				break;
		}
	}
	return more;
}

/* The first delta from here on, or TABLE_END. */
static Position
first_delta(Position from)
{
	run_statement(FOLD_PROBE, 0, from, 0, NULL, SPI_OK_SELECT);
	return SPI_processed > 0 ? result_position(0) : TABLE_END;
}

/*
 * A piece was folded: go on behind it.  If it was part of one that had failed,
 * the rest of that would fail, so try half of it.
 */
static void
search_passed(Search *search, Position to)
{
	search->next = to;
	if (to < search->bad_until)
		search->size = Max((search->bad_until - to) / 2, 1);
	else
		search->size = search->size < TABLE_END ? search->size * 2 : 0;
}

/* A piece failed: halve it.  Returns true if it cannot be halved. */
static bool
search_failed(Search *search, Position from, Position to)
{
	search->next = from;
	search->bad_until = to;
	search->size = (to - from) / 2;
	if (search->size > 0)
		return false;
	search->next = to;
	search->size = 1;
	return true;
}

/*
 * Where is a share to end that begins here?  As few shares as it takes are to
 * lead up to the given end, all with as many deltas.
 *
 * One block may be full of deltas and the next of totals, or empty: how they are
 * spread is known from samples.  Between two of them a share may end early or
 * late, so there is at most one share's worth of blocks; but a worker that has
 * become slow is not to crawl through a table that is all but empty.
 */
static Position
share_end(Position from, Position to)
{
	uint64		first = from / ROWS_PER_BLOCK;
	double		step;			/* blocks from one sample to the next */
	int64		found[SAMPLES];
	int64		total = 0;
	double		rows;
	double		shares;
	double		wanted;
	int			i;

	if (to - from <= share_rows)
		return to;
	step = Min(MAX_BLOCKS / SAMPLES, Max(4, share_rows / ROWS_PER_BLOCK));
	to = Min(to, BLOCK_START(first + 1 + (uint64) (step * SAMPLES)));
	step = (double) (to - from) / ROWS_PER_BLOCK / SAMPLES;
	for (i = 0; i < SAMPLES; i++)
	{
		Position	at = BLOCK_START(first + (uint64) (i * step));

		run_statement(FOLD_COUNT, 0, at, at + ROWS_PER_BLOCK, NULL,
					  SPI_OK_SELECT);
		found[i] = result_int64(1);
		total += found[i];
	}
	rows = total * step;
	if (rows <= last_share_rows)
		return to;

	shares = Max(rint(rows / share_rows), 2);
	wanted = total / shares;
	for (i = 0; wanted > found[i]; i++)
		wanted -= found[i];
	return Min(to, BLOCK_START(first + 1 + (uint64) ((i + wanted / found[i]) * step)));
}

/*
 * Fold the range that begins with the first delta not yet looked at.  Returns
 * false if there is none.  Blocks that were added to the table since the cycle
 * began are left for the next one, or a cycle might never end.
 */
static bool
fold_range(void)
{
	Search	   *search = &Cycle.search;
	Position	from = first_delta(search->next);
	Position	to = Cycle.end;

	if (search->next == 0)
		Cycle.first = from;

	/* These are in the order of the table. */
	for (int i = 0; i < Stuck.naside; i++)
	{
		if (from >= Stuck.aside[i].from && from < Stuck.aside[i].to)
			from = first_delta(Stuck.aside[i].to);
		if (from < Stuck.aside[i].from)
			to = Min(to, Stuck.aside[i].from);
	}
	if (from >= Cycle.end)
		return false;

	if (search->size > 0)
		to = Min(to, from + search->size);
	if (from < to)
	{
		to = share_end(from, to);
		Share.from = from;
		Share.to = to;
		fold_rows(from, to);
		to = Share.to;
	}
	search_passed(search, to);
	return search->next < Cycle.end;
}

/*
 * Learn from a share how much the next one should do.  Its time went to rows,
 * and to totals.  With more rows it would write more totals, but only as many
 * as it wrote for the first time in this cycle; the others it writes anyway.
 */
static void
adapt_share(const Sums *sums, double ms)
{
	double		goal = Counted.has_keys ? KEYED_SHARE_MS : SHARE_MS;
	double		rows = Max(sums->rows, 1);
	double		row_ms = Max(ms, 1.0) / (rows + TOTAL_ROWS * sums->keys) *
		(1 + TOTAL_ROWS * sums->fresh / rows);
	double		wanted = rows + (goal - ms) / row_ms;

	/* One that was fast for want of rows does not show a thing. */
	if (ms > goal)
		share_rows = Max(wanted, share_rows / 3);
	else if (sums->rows >= share_rows / 2)
		share_rows = Max(share_rows, Min(wanted, share_rows * 3));
	else
		return;
	share_rows = Max(share_rows, MIN_ROWS);
	last_share_rows = Min(share_rows + goal * LAST_STRETCH / row_ms,
						  share_rows * 1.5);
}

/* -------------------------------------------------------------------------
 * One range
 * -------------------------------------------------------------------------
 */

/* Those of the stuck rows from .. to - 1 that are still there. */
static TidList *
list_stuck(int from, int to)
{
	TidList    *list = palloc(sizeof(TidList));

	list->n = 0;
	for (int i = from; i < to; i++)
	{
		if (!Stuck.rows[i].gone)
			list->tids[list->n++] = Stuck.rows[i].tid;
	}
	return list;
}

static bool
in_list(const ItemPointerData *tid, const TidList *list)
{
	for (int i = 0; i < list->n; i++)
	{
		if (ItemPointerEquals((ItemPointer) tid, (ItemPointer) &list->tids[i]))
			return true;
	}
	return false;
}

/* The error that the server would raise if a sum did not fit. */
static const WorkerError *
overflow_error(void)
{
	static WorkerError error;

	error.sqlstate = ERRCODE_NUMERIC_VALUE_OUT_OF_RANGE;
	strlcpy(error.message,
			Counted.columns[0].type->oid == INT4OID ?
			"integer out of range" : "bigint out of range",
			sizeof(error.message));
	return &error;
}

/* More sums do not fit than can be remembered: try half of the range. */
static void
raise_overflow(void)
{
	const WorkerError *error = overflow_error();

	ereport(ERROR,
			(errcode(error->sqlstate),
			 errmsg_internal("%s", error->message)));
}

/* The rows in the nth column of what the last statement returned. */
static TidList *
result_tids(int n)
{
	TidList    *list = palloc0(sizeof(TidList));
	bool		isnull;
	Datum		array = SPI_getbinval(SPI_tuptable->vals[0],
									  SPI_tuptable->tupdesc, n, &isnull);
	Datum	   *elements;
	int			nelements;

	if (isnull)
		return list;
	deconstruct_array(DatumGetArrayTypeP(array), TIDOID,
					  sizeof(ItemPointerData), false, TYPALIGN_SHORT,
					  &elements, NULL, &nelements);

	if (nelements > MAX_STUCK)
		raise_overflow();
	for (int i = 0; i < nelements; i++)
		list->tids[list->n++] = *(ItemPointer) DatumGetPointer(elements[i]);
	return list;
}

/* Add the deltas of a range to their totals. */
static void
add_deltas(int built_for, Position from, Position to, const TidList *tids,
		   Sums *sums)
{
	run_statement(FOLD_ADD, built_for, from, to, tids, SPI_OK_SELECT);
	sums->rows = result_int64(1);
	sums->keys = result_int64(2);
	sums->fresh = result_int64(4);
	sums->total = result_int64(5);
	sums->unfit = result_tids(6);
	if (sums->keys != result_int64(3))
		ereport(ERROR,
				(errcode(ERRCODE_TRIGGERED_DATA_CHANGE_VIOLATION),
				 errmsg("cannot fold table \"%s\"", my_table),
				 errdetail("A trigger keeps rows from being inserted or updated.")));
}

/*
 * Delete the same deltas.  A trigger can suppress that; then the count would
 * come out wrong, so the whole share is given up.
 */
static void
delete_deltas(int built_for, Position from, Position to, const TidList *tids,
			  const Sums *sums)
{
	if (sums->rows > 0)
	{
		run_statement(FOLD_DELETE, built_for, from, to, tids, SPI_OK_DELETE);
		if ((int64) SPI_processed != sums->rows)
			ereport(ERROR,
					(errcode(ERRCODE_TRIGGERED_DATA_CHANGE_VIOLATION),
					 errmsg("cannot fold table \"%s\"", my_table),
					 errdetail("A trigger keeps rows from being deleted.")));
		Cycle.rows += sums->rows;
		Cycle.totals += sums->fresh;
		Cycle.total = sums->total;
	}
}

/* Remember the first error of what is stuck, for worker_spi_fold(). */
static void
note_error(const WorkerError *error)
{
	if (Stuck.error.sqlstate == 0)
		Stuck.error = *error;
}

static void
set_reason(StuckRow *row, const WorkerError *error)
{
	if (row->reason)
		pfree(row->reason);
	row->sqlstate = error->sqlstate;
	row->reason = MemoryContextStrdup(Stuck.context, error->message);
	note_error(error);
}

/* Leave a row, or all deltas of its key, out of what follows. */
static bool
add_stuck(const ItemPointerData *tid, const WorkerError *error)
{
	StuckRow   *row = &Stuck.rows[Stuck.nrows];

	if (Stuck.nrows == MAX_STUCK)
		return false;
	MemSet(row, 0, sizeof(StuckRow));
	row->tid = *tid;
	set_reason(row, error);
	Stuck.nrows++;
	return true;
}

/* Leave a range to the next retry. */
static void
set_aside(Position from, Position to, const WorkerError *error)
{
	int			i = Stuck.naside;

	/* Kept in the order of the table. */
	while (i > 0 && Stuck.aside[i - 1].from > from)
		i--;
	if (Stuck.naside == MAX_ASIDE)
	{
		/* No room: let a neighbour cover it, with all that is between. */
		i = Max(i - 1, 0);
		Stuck.aside[i].from = Min(Stuck.aside[i].from, from);
		Stuck.aside[i].to = Max(Stuck.aside[i].to, to);
	}
	else
	{
		memmove(&Stuck.aside[i + 1], &Stuck.aside[i],
				sizeof(AsideRange) * (Stuck.naside - i));
		Stuck.aside[i].from = from;
		Stuck.aside[i].to = to;
		Stuck.aside[i].sqlstate = error->sqlstate;
		Stuck.aside[i].logged = false;
		Stuck.naside++;
	}
	note_error(error);
}

/*
 * Without keys: the longest part of a range whose sum fits, rows taken in
 * their order.  Returns where it ends, or its beginning if there is none.
 */
static Position
longest_fit(Position from, Position to, const TidList *tids)
{
	run_statement(FOLD_PREFIX, BUT_STUCK | MANY_KEYS, from, to, tids,
				  SPI_OK_SELECT);
	return Max(from, result_position(0) + 1);
}

/*
 * Would it cost more to look each key's total up than to read all of them?
 * Looking one up costs some 2 to 4 microseconds, by its type and collation, and
 * reading one costs 0.1 to 0.2.
 */
static bool
has_many_keys(Position from, Position to)
{
	Relation	index;

	if (!Counted.has_keys)
		return false;

	/* Somebody may be dropping it concurrently. */
	row_limit = 0;
	index = try_relation_open(Counted.total_index, AccessShareLock);
	if (index)
	{
		double		totals;
		double		allvisfrac;

		estimate_rel_size(index, NULL, &index_blocks, &totals, &allvisfrac);
		row_limit = totals / 20;
		relation_close(index, AccessShareLock);
	}
	run_statement(FOLD_MANY, 0, from, to, NULL, SPI_OK_SELECT);
	return SPI_processed > 0;
}

/* Fold a range, but for what is stuck. */
static void
fold_rows(Position from, Position to)
{
	int			built_for = Stuck.nrows > 0 ? BUT_STUCK : 0;
	TidList    *tids = list_stuck(0, Stuck.nrows);
	instr_time	start;
	instr_time	end;
	Sums		sums;

	INSTR_TIME_SET_CURRENT(start);
	if (has_many_keys(from, to))
		built_for |= MANY_KEYS;
	add_deltas(built_for, from, to, tids, &sums);

	if (sums.unfit->n > 0 && !Counted.has_keys)
	{
		/* As far as it fits, or else all that is left, if that fits. */
		to = longest_fit(from, to, tids);
		if (to == from)
			to = longest_fit(from, Cycle.end, tids);
		if (to > from)
			add_deltas(built_for, from, to, tids, &sums);
		else
			set_aside(from, to = Cycle.end, overflow_error());
		Share.to = to;
	}
	else if (sums.unfit->n > 0)
	{
		for (int i = 0; i < sums.unfit->n; i++)
		{
			if (!add_stuck(&sums.unfit->tids[i], overflow_error()))
				raise_overflow();
		}
		built_for = BUT_STUCK | MANY_KEYS;
		tids = list_stuck(0, Stuck.nrows);
	}
	delete_deltas(built_for, from, to, tids, &sums);

	INSTR_TIME_SET_CURRENT(end);
	INSTR_TIME_SUBTRACT(end, start);
	adapt_share(&sums, INSTR_TIME_GET_MILLISEC(end));
}

/* -------------------------------------------------------------------------
 * Totals in front
 * -------------------------------------------------------------------------
 */

/*
 * The blocks in front that ought to hold all totals: 8 MB, or some four times
 * what the index on them takes.
 */
static BlockNumber
front_blocks(void)
{
	return Max(1024, 4 * index_blocks);
}

/*
 * A backlog leaves the totals it has made, or written anew, behind its deltas,
 * so that no vacuum can truncate the table, and each later cycle has to read
 * through it all.  Small cycles need not care.  Where there are triggers, they
 * would take what we do for more than it is.
 *
 * It is left to the next cycle.  Whoever waits for this one is not to wait for
 * that too, and has a snapshot that keeps the room of the deltas from being used
 * again.  As long as somebody else's does, it is left to a later one.
 */
static bool
wants_tidying(void)
{
	bool		wanted = untidy && Cycle.end > BLOCK_START(2 * front_blocks());

	untidy = wanted || Cycle.rows >= TIDY_ROWS;
	return wanted &&
		Counted.replication_role == SESSION_REPLICATION_ROLE_REPLICA;
}

/*
 * How much room is in front, beside what the fill factor reserves?
 *
 * The deltas that stood there are gone, but until a vacuum has been there,
 * nobody knows of the room: say so in its stead.  Reading a block prunes it, if
 * nobody can see those rows.  The server has to find out anew who can, and it
 * prunes only what seems to be full, as no block does that inserts have filled
 * up to the fill factor.  That is a hint, so it need not last.
 */
static Size
make_room_known(Relation rel, BlockNumber nblocks, Size reserve)
{
	Size		space = 0;

	(void) GetOldestNonRemovableTransactionId(rel);
	for (BlockNumber block = 0; block < nblocks; block++)
	{
		Buffer		buffer = ReadBuffer(rel, block);

		LockBuffer(buffer, BUFFER_LOCK_EXCLUSIVE);
		PageSetFull(BufferGetPage(buffer));
		UnlockReleaseBuffer(buffer);
	}
	run_statement(FOLD_COUNT, 0, 0, BLOCK_START(nblocks), NULL, SPI_OK_SELECT);

	for (BlockNumber block = 0; block < nblocks; block++)
	{
		Buffer		buffer = ReadBuffer(rel, block);
		Size		room;

		LockBuffer(buffer, BUFFER_LOCK_SHARE);
		room = PageGetHeapFreeSpace(BufferGetPage(buffer));
		UnlockReleaseBuffer(buffer);
		RecordPageWithFreeSpace(rel, block, room);
		space += Max(room, reserve) - reserve;
	}
	return space;
}

/*
 * Hide the room behind until the next vacuum, or totals would end up there
 * again, and be moved for ever.
 */
static void
hide_room(Relation rel, BlockNumber from)
{
	BlockNumber end = RelationGetNumberOfBlocks(rel);

	for (BlockNumber block = from; block < end; block++)
	{
		CHECK_FOR_INTERRUPTS();
		RecordPageWithFreeSpace(rel, block, 0);
	}
	FreeSpaceMapVacuum(rel);
	RelationSetTargetBlock(rel, InvalidBlockNumber);	/* where we last wrote */
}

/*
 * Write totals anew that stand far behind, so that they come to the front.
 * Returns true if there may be more of them.
 */
static bool
move_totals(Relation rel)
{
	BlockNumber nblocks = front_blocks();
	Size		reserve = RelationGetTargetPageFreeSpace(rel,
														 HEAP_DEFAULT_FILLFACTOR);
	uint64		in_front = 0;

	/* A vacuum may have truncated it since the cycle began. */
	if (RelationGetNumberOfBlocks(rel) <= nblocks)
	{
		untidy = false;
		return false;
	}

	/* Somebody's snapshot may keep the room from being used again. */
	if (make_room_known(rel, nblocks, reserve) < nblocks * (BLCKSZ - reserve) / 2)
		return false;
	hide_room(rel, nblocks);

	row_limit = TIDY_LIMIT;
	run_statement(FOLD_MOVE, MANY_KEYS, BLOCK_START(nblocks), 0, NULL,
				  SPI_OK_INSERT_RETURNING);
	for (uint64 i = 0; i < SPI_processed; i++)
		in_front += result_position(i) < BLOCK_START(nblocks);

	/*
	 * Go on as long as there is room, in a later cycle if somebody else took
	 * it; but if none has come to the front, leave them where they are.
	 */
	untidy = in_front > 0 &&
		(SPI_processed >= TIDY_LIMIT || in_front < SPI_processed);
	return untidy && in_front == SPI_processed;
}

/* -------------------------------------------------------------------------
 * What is stuck
 * -------------------------------------------------------------------------
 */

/*
 * Judge keys that were left out, with all their deltas, wherever they are.
 * Returns false if there are no more of them.
 */
static bool
fold_suspects(void)
{
	Search	   *search = &Cycle.search;
	int			from = search->next;
	int			to = Stuck.nrows;
	int			built_for = ONLY_STUCK | MANY_KEYS;
	TidList    *tids;
	TidList    *unfit;
	Sums		sums;

	if (from >= Stuck.nrows)
		return false;
	if (search->size > 0)
		to = Min(to, from + search->size);
	Share.from = from;
	Share.to = to;

	tids = list_stuck(from, to);
	add_deltas(built_for, 0, TABLE_END, tids, &sums);

	/* Without keys, they are one sum. */
	unfit = sums.unfit;
	if (unfit->n > 0 && !Counted.has_keys)
		unfit = tids;

	if (sums.rows > 0)
	{
		TidList    *fit = palloc0(sizeof(TidList));

		for (int i = 0; i < tids->n; i++)
		{
			if (!in_list(&tids->tids[i], unfit))
				fit->tids[fit->n++] = tids->tids[i];
		}
		delete_deltas(built_for, 0, TABLE_END, fit, &sums);
	}
	for (int i = from; i < to; i++)
	{
		if (in_list(&Stuck.rows[i].tid, unfit))
			set_reason(&Stuck.rows[i], overflow_error());
		else
			Stuck.rows[i].gone = true;
	}
	search_passed(search, to);
	return search->next < Stuck.nrows;
}

/* Is it the fault of some rows, so that others can be folded all the same? */
static bool
is_data_error(const WorkerError *error)
{
	/* What is left to do is to report; that need not have names. */
	if (Cycle.phase == PHASE_REPORT && nameless)
		return false;

	switch (ERRCODE_TO_CATEGORY(error->sqlstate))
	{
		case ERRCODE_CARDINALITY_VIOLATION:
		case ERRCODE_DATA_EXCEPTION:
		case ERRCODE_INTEGRITY_CONSTRAINT_VIOLATION:
		case ERRCODE_PROGRAM_LIMIT_EXCEEDED:
		case ERRCODE_PLPGSQL_ERROR:
			return true;
	}

	/* We had the table, so it is a row that somebody else has locked. */
	return error->sqlstate == ERRCODE_LOCK_NOT_AVAILABLE;
}

/* A share has failed over its rows: decide what the next one tries. */
static void
search_failed_share(const WorkerError *error)
{
	Search	   *search = &Cycle.search;
	instr_time	now;
	bool		give_up;

	INSTR_TIME_SET_CURRENT(now);
	if (tries++ == 0)
		search_start = now;
	INSTR_TIME_SUBTRACT(now, search_start);
	give_up = (tries > MAX_TRIES ||
			   INSTR_TIME_GET_MILLISEC(now) > MAX_SEARCH_MS);

	if (Cycle.phase == PHASE_REPORT)
		nameless = true;
	else if (Cycle.phase == PHASE_TIDY)
		Cycle.phase = PHASE_END;	/* it can wait */
	else if (Cycle.phase == PHASE_JUDGE)
	{
		if (give_up)
			Cycle.phase = PHASE_REPORT;
		else if (search_failed(search, Share.from, Share.to))
			set_reason(&Stuck.rows[Share.from], error);
	}
	else
	{
		Position	to = Share.to;
		ItemPointerData tid;

		/* If it is the only total that is locked, no half can do better. */
		if (!Counted.has_keys && Share.statement == FOLD_ADD &&
			error->sqlstate == ERRCODE_LOCK_NOT_AVAILABLE)
		{
			give_up = true;
			to = Cycle.end;
		}
		if (give_up)
		{
			set_aside(Share.from, to, error);
			search->next = to;
			search->size = 0;
		}
		else if (search_failed(search, Share.from, Share.to))
		{
			position_tid(Share.from, &tid);
			if (!add_stuck(&tid, error))
				set_aside(Share.from, Share.to, error);
		}
	}
}

/*
 * Count the deltas that are left, and have names for what the log is to say
 * of them.  Where whole ranges were set aside, the count is a lower bound.
 */
static void
report_stuck(void)
{
	TidList    *unlogged = palloc0(sizeof(TidList));

	Cycle.left = 0;
	for (int i = 0; i < Stuck.naside; i++)
	{
		run_statement(FOLD_COUNT, 0, Stuck.aside[i].from, Stuck.aside[i].to,
					  NULL, SPI_OK_SELECT);
		Cycle.left += result_int64(1);
	}
	if (Stuck.naside == 0)
	{
		/* There are no deltas in front, but there may be many totals. */
		run_statement(FOLD_COUNT_STUCK, ONLY_STUCK | MANY_KEYS, Cycle.first,
					  TABLE_END, list_stuck(0, Stuck.nrows),
					  SPI_OK_SELECT);
		Cycle.left = result_int64(1);
	}
	else
	{
		/* One for each key that is outside of these ranges. */
		for (int i = 0; i < Stuck.nrows; i++)
		{
			Position	at = tid_position(&Stuck.rows[i].tid);
			bool		counted = Stuck.rows[i].gone;

			for (int j = 0; j < Stuck.naside; j++)
				counted |= (at >= Stuck.aside[j].from && at < Stuck.aside[j].to);
			if (!counted)
				Cycle.left++;
		}
	}

	for (int i = 0; i < Stuck.nrows && unlogged->n < MAX_LOG_LINES; i++)
	{
		StuckRow   *row = &Stuck.rows[i];

		if (!row->gone && !row->logged)
			unlogged->tids[unlogged->n++] = row->tid;
	}
	if (unlogged->n == 0 || nameless || !Counted.has_keys)
		return;
	run_statement(FOLD_NAMES, 0, 0, 0, unlogged, SPI_OK_SELECT);
	for (uint64 n = 0; n < SPI_processed; n++)
	{
		HeapTuple	tuple = SPI_tuptable->vals[n];
		bool		isnull;
		ItemPointer tid = (ItemPointer) DatumGetPointer(SPI_getbinval(tuple, SPI_tuptable->tupdesc,
																	  1, &isnull));

		for (int i = 0; i < Stuck.nrows; i++)
		{
			StuckRow   *row = &Stuck.rows[i];

			if (ItemPointerEquals(&row->tid, tid) && row->name == NULL)
				row->name = MemoryContextStrdup(Stuck.context,
												SPI_getvalue(tuple, SPI_tuptable->tupdesc, 2));
		}
	}
}

static bool
anything_stuck(void)
{
	for (int i = 0; i < Stuck.nrows; i++)
	{
		if (!Stuck.rows[i].gone)
			return true;
	}
	return Stuck.naside > 0;
}

/* How a row is called in the log. */
static char *
row_name(const StuckRow *row)
{
	if (row->name)
		return psprintf("key %s%s", row->name,
						pg_mbstrlen(row->name) < NAME_LENGTH ? "" : "...");
	return psprintf("row (%u,%u)", ItemPointerGetBlockNumberNoCheck(&row->tid),
					ItemPointerGetOffsetNumberNoCheck(&row->tid));
}

/* Say what is stuck now and was not, and what no longer is. */
static void
log_stuck(void)
{
	int			lines = 0;

	for (int i = 0; i < Stuck.nrows; i++)
	{
		StuckRow   *row = &Stuck.rows[i];

		if (row->gone != row->logged || ++lines > MAX_LOG_LINES)
			continue;
		if (row->gone)
			ereport(LOG,
					(errmsg("%s: %s of %s is no longer stuck",
							MyBgworkerEntry->bgw_name, row_name(row), my_table)));
		else
			ereport(LOG,
					(errmsg("%s: %s of %s is stuck: %s (SQLSTATE %s)",
							MyBgworkerEntry->bgw_name, row_name(row), my_table,
							row->reason, unpack_sql_state(row->sqlstate))));
	}
	for (int i = 0; i < Stuck.naside; i++)
	{
		AsideRange *range = &Stuck.aside[i];

		if (range->logged || logged_aside > 0 || ++lines > MAX_LOG_LINES)
			continue;
		ereport(LOG,
				(errmsg("%s: blocks %u to %u of %s are set aside (SQLSTATE %s)",
						MyBgworkerEntry->bgw_name,
						(BlockNumber) (range->from / ROWS_PER_BLOCK),
						(BlockNumber) ((range->to - 1) / ROWS_PER_BLOCK),
						my_table, unpack_sql_state(range->sqlstate))));
	}
	if (logged_aside > 0 && Stuck.naside == 0 && ++lines <= MAX_LOG_LINES)
		ereport(LOG,
				(errmsg("%s: no blocks of %s are set aside any more",
						MyBgworkerEntry->bgw_name, my_table)));
	logged_aside = Stuck.naside;
	if (lines > MAX_LOG_LINES)
		ereport(LOG,
				(errmsg("%s: the same of %d more keys, rows or ranges of %s",
						MyBgworkerEntry->bgw_name, lines - MAX_LOG_LINES,
						my_table)));
	for (int i = 0; i < Stuck.nrows; i++)
		Stuck.rows[i].logged = true;
}

/* Forget what is no longer stuck. */
static void
forget_gone(void)
{
	int			n = 0;

	for (int i = 0; i < Stuck.nrows; i++)
	{
		StuckRow   *row = &Stuck.rows[i];

		if (!row->gone)
			Stuck.rows[n++] = *row;
		else
		{
			if (row->reason)
				pfree(row->reason);
			if (row->name)
				pfree(row->name);
		}
	}
	Stuck.nrows = n;
}

/* -------------------------------------------------------------------------
 * Building and running the statements
 * -------------------------------------------------------------------------
 */

static void expand(StringInfo sql, const char *text, const Column *column,
				   int built_for);

/* Append what a % in a fragment stands for. */
static void
expand_column(StringInfo sql, char what, const Column *column)
{
	Assert(column != NULL);		/* no other fragment has a % */
	switch (what)
	{
		case 'c':
			appendStringInfoString(sql, column->name);
			break;
		case 'i':
			appendStringInfo(sql, "%d", column->number);
			break;
		case '=':
			appendStringInfoString(sql, column->equals);
			break;
		case 't':
			appendStringInfoString(sql, column->type->name);
			break;
		case 'l':
			appendStringInfoString(sql, column->type->lowest);
			break;
		case 'h':
			appendStringInfoString(sql, column->type->highest);
			break;
		case 'a':
			appendStringInfoString(sql, column->kind->aggregate);
			break;
		case 'f':
			appendStringInfoString(sql, column->kind->function);
			break;
		default:
			elog(ERROR, "unexpected %%%c in a fragment", what);
	}
}

/* Append all that a name in braces stands for. */
static void
expand_name(StringInfo sql, const char *name, int built_for)
{
	bool		found = false;

	if (strcmp(name, "table") == 0)
		appendStringInfoString(sql, my_table);
	else if (!isalpha((unsigned char) name[0]))
		appendStringInfo(sql, "OPERATOR(pg_catalog.%s)", name);
	else
	{
		for (int i = 0; i < lengthof(fragments); i++)
		{
			const struct Fragment *fragment = &fragments[i];
			bool		first = true;

			if (strcmp(fragment->name, name) != 0)
				continue;
			found = true;
			if ((built_for & fragment->built_for) != fragment->built_for)
				continue;
			if (fragment->columns == 0)
				expand(sql, fragment->text, NULL, built_for);
			for (int j = 0; fragment->columns != 0 && j < Counted.ncolumns; j++)
			{
				const Column *column = &Counted.columns[j];

				if ((column->flags & fragment->columns) != fragment->columns)
					continue;
				if (!first)
					appendStringInfoString(sql, fragment->separator);
				first = false;
				expand(sql, fragment->text, column, built_for);
			}
		}
		if (!found)
			elog(ERROR, "there is no fragment \"%s\"", name);
	}
}

/* Append text, with all that stands for something replaced by it. */
static void
expand(StringInfo sql, const char *text, const Column *column, int built_for)
{
	for (const char *p = text; *p; p++)
	{
		if (*p == '{')
		{
			const char *end = strchr(p, '}');

			expand_name(sql, pnstrdup(p + 1, end - p - 1), built_for);
			p = end;
		}
		else if (*p == '%')
			expand_column(sql, *++p, column);
		else
			appendStringInfoChar(sql, *p);
	}
}

/*
 * Refuse a statement that names another table than the one we have locked.
 *
 * The lock keeps the table from being renamed or replaced, but not its schema.
 * Somebody who renames that, and has a table of the same name ready in a new
 * one, would have its triggers run as the owner of the first.  The parser
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

		if (rte->rtekind == RTE_RELATION && rte->relid != Counted.relid)
			ereport(ERROR,
					(errcode(ERRCODE_OBJECT_IN_USE),
					 errmsg("table \"%s\" was replaced while it was being folded",
							my_table)));
	}
	return NULL;				/* let the parser go on as usual */
}

static const Oid param_types[] = {TIDOID, TIDOID, TIDARRAYOID, XIDOID, INT8OID};

static void
setup_parser(ParseState *pstate, void *arg)
{
	setup_parse_fixed_parameters(pstate, param_types, lengthof(param_types));
	pstate->p_pre_columnref_hook = check_statement_table;
}

/* The plan of a statement, made when it is first needed. */
static SPIPlanPtr
get_plan(FoldStatement which, int built_for)
{
	int			n = PLAN_NUMBER(which, built_for);

	if (Counted.plans[n] == NULL)
	{
		/* Planning anew for each range would cost more than it can gain. */
		SPIPrepareOptions options = {
			.parserSetup = setup_parser,
			.cursorOptions = CURSOR_OPT_GENERIC_PLAN
		};
		StringInfoData sql;
		SPIPlanPtr	plan;

		initStringInfo(&sql);
		expand(&sql, statements[which], NULL, built_for | Counted.bits |
			   ((built_for & MANY_KEYS) ? 0 : FEW_KEYS) |
			   ((built_for & (BUT_STUCK | ONLY_STUCK)) ? 0 : ALL_ROWS));
		Counted.sql[n] = MemoryContextStrdup(Counted.context, sql.data);
		plan = SPI_prepare_extended(sql.data, &options);
		if (plan == NULL)
			elog(ERROR, "SPI_prepare_extended failed: %s",
				 SPI_result_code_string(SPI_result));
		SPI_keepplan(plan);
		Counted.plans[n] = plan;
	}
	return Counted.plans[n];
}

/*
 * Change a setting until we are no longer the table's owner.  Code of the table
 * may have changed it before, as a SET does, and GUC_ACTION_SAVE must not come
 * after that: an assertion would fail.
 */
static void
set_locally(const char *name, const char *value)
{
	(void) set_config_option(name, value, PGC_SUSET, PGC_S_SESSION,
							 GUC_ACTION_SET, true, 0, false);
}

/*
 * Run a statement on the range from .. to - 1, with some rows for $3.
 *
 * Plans are made when the table is empty as well as when it is full, and used
 * for both, so the planner's estimates are worth nothing: what is best for
 * many keys and for few is told it here.
 */
static void
run_statement(FoldStatement which, int built_for, Position from, Position to,
			  const TidList *tids, int expected)
{
	bool		many = (built_for & MANY_KEYS) != 0;
	ItemPointerData bounds[2];
	Datum		elements[MAX_STUCK];
	ParamListInfo params = makeParamList(lengthof(param_types));
	SPIExecuteOptions options = {.params = params};
	SPIPlanPtr	plan;
	int			rc;

	Share.statement = which;
	set_locally("enable_indexscan", many ? "off" : "on");
	set_locally("enable_bitmapscan", many ? "on" : "off");
	plan = get_plan(which, built_for);

	for (int i = 0; tids && i < tids->n; i++)
		elements[i] = PointerGetDatum(&tids->tids[i]);
	position_tid(from, &bounds[0]);
	position_tid(to, &bounds[1]);
	for (int i = 0; i < lengthof(param_types); i++)
	{
		params->params[i].isnull = false;
		params->params[i].pflags = PARAM_FLAG_CONST;
		params->params[i].ptype = param_types[i];
	}
	params->params[0].value = PointerGetDatum(&bounds[0]);
	params->params[1].value = PointerGetDatum(&bounds[1]);
	params->params[2].value =
		PointerGetDatum(construct_array(elements, tids ? tids->n : 0, TIDOID,
										sizeof(ItemPointerData), false,
										TYPALIGN_SHORT));
	params->params[3].value =
		TransactionIdGetDatum(TransactionIdIsValid(Cycle.first_xid) ?
							  Cycle.first_xid : ReadNextTransactionId());
	params->params[4].value = Int64GetDatum(row_limit);

	pgstat_report_activity(STATE_RUNNING,
						   Counted.sql[PLAN_NUMBER(which, built_for)]);
	rc = SPI_execute_plan_extended(plan, &options);
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

/* -------------------------------------------------------------------------
 * The table: making it, looking at it
 * -------------------------------------------------------------------------
 */

/* The relcache forgot something; if it was our table, look at it anew. */
static void
invalidate_table(Datum arg, Oid relid)
{
	if (relid == Counted.relid || !OidIsValid(relid))
		Counted.valid = false;
}

/*
 * Make the schema, as ourselves, and the table, as the schema's owner, if they
 * are missing.
 *
 * The table is a queue: as many rows die as are inserted.  By default,
 * autovacuum would wait until a fifth of the table is dead, so the larger a
 * burst has made it, the longer, and would pause while it works.  The fill
 * factor leaves room for new versions of the total on its page, which therefore
 * stays the first, so that a vacuum can truncate the table after a backlog.
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

	/* Many workers that start at once queue up to extend the catalogs. */
	SwitchToUntrustedUser(owner, &saved);
	set_locally("lock_timeout", "10s");
	run_command(psprintf("CREATE TABLE %s ("
						 "type pg_catalog.text NOT NULL DEFAULT 'delta'::pg_catalog.text,"
						 " value pg_catalog.int8 NOT NULL)"
						 " WITH (fillfactor = 90,"
						 " autovacuum_vacuum_scale_factor = 0,"
						 " autovacuum_vacuum_threshold = 10000,"
						 " autovacuum_vacuum_cost_delay = 0)",
						 my_table));
	run_command(psprintf("CREATE UNIQUE INDEX ON %s (type)"
						 " WHERE type OPERATOR(pg_catalog.=) 'total'::pg_catalog.text",
						 my_table));
	RestoreUserContext(&saved);
}

/* Refuse what cannot be folded.  The lock on rel keeps it as it is. */
static void
check_kind(Relation rel)
{
	static Oid	warned = InvalidOid;

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

	if (rel->rd_rel->relpersistence == RELPERSISTENCE_UNLOGGED &&
		warned != RelationGetRelid(rel))
	{
		warned = RelationGetRelid(rel);
		ereport(WARNING,
				(errmsg("table \"%s\" is unlogged", my_table),
				 errdetail("A crash of the server empties it, totals included.")));
	}
}

/* Find a column that every table must have. */
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

/* The type of a measure, or NULL if a measure cannot have it. */
static const struct MeasureType *
measure_type(Oid oid)
{
	for (int i = 0; i < lengthof(measure_types); i++)
	{
		if (measure_types[i].oid == oid)
			return &measure_types[i];
	}
	return NULL;
}

/* Does an expression call what is not the server's own, or not immutable? */
static bool
is_foreign_function(Oid funcid, void *context)
{
	return funcid >= FirstUnpinnedObjectId ||
		func_volatile(funcid) != PROVOLATILE_IMMUTABLE;
}

static bool
calls_foreign_function(Node *node, void *context)
{
	if (node == NULL)
		return false;
	if (check_functions_in_node(node, is_foreign_function, context) ||
		IsA(node, NextValueExpr) || IsA(node, CoerceToDomain))
		return true;
	return expression_tree_walker(node, calls_foreign_function, context);
}

/*
 * What kind of measure is a column?  NULL if it is none.  Its default must be
 * a constant by the server's own doing: no code of a user's is run to see.
 */
static const struct MeasureKind *
measure_kind(Relation rel, Form_pg_attribute att)
{
	const struct MeasureType *type = measure_type(att->atttypid);
	Node	   *expr;
	Const	   *value;
	Oid			output;
	bool		isvarlena;
	char	   *text;

	if (type == NULL || !att->attnotnull || !att->atthasdef ||
		att->attidentity)
		return NULL;
	expr = build_column_default(rel, att->attnum);
	if (expr == NULL || calls_foreign_function(expr, NULL))
		return NULL;
	value = (Const *) eval_const_expressions(NULL, expr);
	if (!IsA(value, Const) || value->constisnull)
		return NULL;

	getTypeOutputInfo(att->atttypid, &output, &isvarlena);
	text = OidOutputFunctionCall(output, value->constvalue);
	for (int i = 0; i < lengthof(measure_kinds); i++)
	{
		if (strcmp(text, measure_kinds[i].neutral) == 0)
			return &measure_kinds[i];
	}
	return NULL;
}

/* A comma-separated list of columns, quoted. */
static char *
column_list(Relation rel, Bitmapset *columns)
{
	StringInfoData list;
	int			attnum = -1;

	initStringInfo(&list);
	while ((attnum = bms_next_member(columns, attnum)) >= 0)
		appendStringInfo(&list, "%s%s", list.len > 0 ? ", " : "",
						 quote_identifier(NameStr(TupleDescAttr(RelationGetDescr(rel), attnum - 1)->attname)));
	return list.data;
}

/*
 * Check that a total index compares keys as GROUP BY does, and return its
 * columns, without type.  If it did not, two groups could share one total, and
 * counts of 'A' be booked on 'a'.
 */
static Bitmapset *
index_keys(Relation rel, Relation index, AttrNumber type, AttrNumber value)
{
	Form_pg_index form = index->rd_index;
	const char *detail = NULL;
	bool		nullable = false;
	Bitmapset  *keys = NULL;

	for (int i = 0; i < form->indnkeyatts; i++)
	{
		AttrNumber	attnum = form->indkey.values[i];
		Form_pg_attribute att;
		Oid			opclass;

		if (attnum == 0)
			detail = "A key must be a column, not an expression.";
		else if (attnum == value)
			detail = "Column \"value\" cannot be a key.";
		if (detail)
			break;
		att = TupleDescAttr(RelationGetDescr(rel), attnum - 1);
		if (att->attgenerated)
			detail = "A generated column cannot be a key.";
		opclass = GetDefaultOpClass(att->atttypid, BTREE_AM_OID);
		if (!OidIsValid(opclass) ||
			index->rd_opfamily[i] != get_opclass_family(opclass) ||
			index->rd_indcollation[i] != att->attcollation)
			detail = "It does not compare keys as their columns do.";
		if (attnum == type)
			continue;
		nullable |= !att->attnotnull;
		keys = bms_add_member(keys, attnum);
	}
	if (!detail && nullable && !form->indnullsnotdistinct)
		detail = "Its keys can be NULL, and it takes NULLs for distinct.";
	if (detail)
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_TABLE_DEFINITION),
				 errmsg("index \"%s\" cannot hold the totals of table \"%s\"",
						RelationGetRelationName(index), my_table),
				 errdetail_internal("%s", detail),
				 errhint("Drop the index, or make it on columns alone, with their own collations and default operator classes, and NULLS NOT DISTINCT.")));
	return keys;
}

/*
 * Find the table's unique index on its totals, that is with the predicate
 * type = 'total'.  Its columns are the keys.  Returns false if there is none.
 */
static bool
find_total_index(Relation rel, Form_pg_attribute type, AttrNumber value,
				 Bitmapset **keys)
{
	char	   *found = NULL;
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
			Bitmapset  *these = index_keys(rel, index, type->attnum, value);

			if (found && !bms_equal(these, *keys))
				ereport(ERROR,
						(errcode(ERRCODE_INVALID_TABLE_DEFINITION),
						 errmsg("indexes \"%s\" and \"%s\" of table \"%s\" disagree about its keys",
								found, RelationGetRelationName(index), my_table),
						 errhint("Drop one of them.")));
			found = pstrdup(RelationGetRelationName(index));
			*keys = these;
			Counted.total_index = RelationGetRelid(index);
		}
		index_close(index, AccessShareLock);
	}
	return found != NULL;
}

/* How to write an operator so that it is that one, whatever search_path says. */
static char *
qualified_operator(Oid oid)
{
	HeapTuple	tuple = SearchSysCache1(OPEROID, ObjectIdGetDatum(oid));
	Form_pg_operator operator;
	char	   *result;

	if (!HeapTupleIsValid(tuple))
		elog(ERROR, "cache lookup failed for operator %u", oid);
	operator = (Form_pg_operator) GETSTRUCT(tuple);
	result = psprintf("OPERATOR(%s.%s)",
					  quote_identifier(get_namespace_name(operator->oprnamespace)),
					  NameStr(operator->oprname));
	ReleaseSysCache(tuple);
	return result;
}

/* Add a column to what is known of the table. */
static void
add_column(Form_pg_attribute att, int flags, const struct MeasureKind *kind)
{
	Column	   *column = &Counted.columns[Counted.ncolumns++];

	MemSet(column, 0, sizeof(Column));
	column->flags = flags;
	column->number = Counted.ncolumns;
	column->name = MemoryContextStrdup(Counted.context,
									   quote_identifier(NameStr(att->attname)));
	column->attnum = att->attnum;
	if (flags & MEASURE)
	{
		column->kind = kind;
		column->type = measure_type(att->atttypid);
		column->flags |= kind->flags;
	}
	else
	{
		Oid			equals = lookup_type_cache(att->atttypid,
											   TYPECACHE_EQ_OPR)->eq_opr;

		column->equals = MemoryContextStrdup(Counted.context,
											 qualified_operator(equals));
		if (att->attnotnull && op_hashjoinable(equals, att->atttypid))
			column->flags |= JOINABLE;
		else
			column->flags |= UNJOINABLE;
		if (!att->attnotnull)
		{
			column->flags |= NULLABLE;
			Counted.bits |= NULL_KEYS;
		}
	}
}

/* The command that makes an index on the totals of these keys, or of none. */
static char *
create_index_command(Relation rel, Bitmapset *keys)
{
	TupleDesc	desc = RelationGetDescr(rel);
	bool		nullable = false;

	for (int i = 0; i < desc->natts; i++)
	{
		if (bms_is_member(i + 1, keys) && !TupleDescAttr(desc, i)->attnotnull)
			nullable = true;
	}
	return psprintf("CREATE UNIQUE INDEX ON %s (%s)%s WHERE type = 'total'",
					my_table, keys ? column_list(rel, keys) : "type",
					nullable ? " NULLS NOT DISTINCT" : "");
}

/*
 * Find out which columns are keys and which are measures.  Returns the command
 * that makes the index if that is missing and can be made.
 */
static char *
describe_columns(Relation rel)
{
	TupleDesc	desc = RelationGetDescr(rel);
	Form_pg_attribute type = required_column(rel, "type");
	Form_pg_attribute value = required_column(rel, "value");
	Bitmapset  *keys = NULL;
	Bitmapset  *others = NULL;
	bool		has_index;

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

	has_index = find_total_index(rel, type, value->attnum, &keys);
	Counted.has_keys = (keys != NULL);
	Counted.bits = keys ? WITH_KEYS : WITHOUT_KEYS;
	add_column(value, MEASURE | VALUE, &measure_kinds[0]);
	for (int i = 0; i < desc->natts; i++)
	{
		Form_pg_attribute att = TupleDescAttr(desc, i);
		const struct MeasureKind *kind;

		if (att->attisdropped || att->attgenerated ||
			att == type || att == value)
			continue;
		if (bms_is_member(att->attnum, keys))
			add_column(att, KEY, NULL);
		else if ((kind = measure_kind(rel, att)) != NULL)
			add_column(att, MEASURE, kind);
		else
			others = bms_add_member(others, att->attnum);
	}

	if (others && !has_index)
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_TABLE_DEFINITION),
				 errmsg("table \"%s\" has no index that tells its keys",
						my_table),
				 errdetail("It has columns that are no measures: %s.",
						   column_list(rel, others)),
				 errhint("To make each of them a key: %s",
						 create_index_command(rel, others))));
	if (others)
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_TABLE_DEFINITION),
				 errmsg("column \"%s\" of table \"%s\" is neither a key nor a measure",
						get_attname(RelationGetRelid(rel),
									bms_next_member(others, -1), false),
						my_table),
				 errdetail("A measure is NOT NULL and of type bigint or integer with DEFAULT 0, or of type date or timestamp with DEFAULT '-infinity' or 'infinity'."),
				 errhint("Drop index %s and make one that has the column, or make the column a measure.",
						 quote_qualified_identifier(my_schema, get_rel_name(Counted.total_index)))));

	return has_index ? NULL : create_index_command(rel, NULL);
}

/*
 * Is it the extension's own trigger, which only asks for a fold?  Nobody but a
 * superuser can make another function in C that claims to be it.
 */
static bool
is_wake_trigger(const Trigger *trigger)
{
	HeapTuple	tuple = SearchSysCache1(PROCOID, ObjectIdGetDatum(trigger->tgfoid));
	bool		isnull;
	Datum		source;
	bool		result;

	if (!HeapTupleIsValid(tuple))
		return false;
	source = SysCacheGetAttr(PROCOID, tuple, Anum_pg_proc_prosrc, &isnull);
	result = ((Form_pg_proc) GETSTRUCT(tuple))->prolang == ClanguageId &&
		!isnull && strcmp(TextDatumGetCString(source), "worker_spi_wake") == 0;
	ReleaseSysCache(tuple);
	return result;
}

/* Would a fold fire a trigger, if it is folded in this role? */
static bool
fold_fires(const Trigger *trigger, int role)
{
	bool		enabled = trigger->tgenabled == TRIGGER_FIRES_ALWAYS ||
		trigger->tgenabled == (role == SESSION_REPLICATION_ROLE_REPLICA ?
							   TRIGGER_FIRES_ON_REPLICA : TRIGGER_FIRES_ON_ORIGIN);

	if (!enabled || trigger->tgisinternal)
		return false;
	if (TRIGGER_FOR_INSERT(trigger->tgtype) ||
		TRIGGER_FOR_DELETE(trigger->tgtype))
		return true;
	if (!TRIGGER_FOR_UPDATE(trigger->tgtype))
		return false;
	if (trigger->tgnattr == 0)
		return true;
	for (int i = 0; i < trigger->tgnattr; i++)
	{
		for (int j = 0; j < Counted.ncolumns; j++)
		{
			if ((Counted.columns[j].flags & MEASURE) &&
				Counted.columns[j].attnum == trigger->tgattr[i])
				return true;
		}
	}
	return false;
}

/*
 * Choose the session_replication_role to fold the table with.
 *
 * As a replica, the session fires no ordinary trigger: whoever has the TRIGGER
 * privilege on the table cannot have code run as its owner.  It does not check
 * foreign keys and deferrable constraints either, nor those of other tables
 * that an ALWAYS trigger writes to.  Where there are such, we fold as any
 * other session, and refuse ordinary triggers instead.
 */
static int
choose_replication_role(Relation rel)
{
	/* A copy: whenever we read a catalog, the relcache may free its own. */
	TriggerDesc *triggers = CopyTriggerDesc(rel->trigdesc);
	int			ntriggers = triggers ? triggers->numtriggers : 0;
	int			role = SESSION_REPLICATION_ROLE_REPLICA;

	for (int i = 0; i < ntriggers; i++)
	{
		Trigger    *trigger = &triggers->triggers[i];

		if (trigger->tgenabled == TRIGGER_FIRES_ALWAYS ||
			(trigger->tgisinternal && trigger->tgenabled != TRIGGER_DISABLED))
			role = SESSION_REPLICATION_ROLE_ORIGIN;
	}
	for (int i = 0; i < ntriggers; i++)
	{
		Trigger    *trigger = &triggers->triggers[i];
		const char *name = quote_identifier(trigger->tgname);

		if (!fold_fires(trigger, role))
			continue;
		if (TRIGGER_FOR_BEFORE(trigger->tgtype) &&
			TRIGGER_FOR_ROW(trigger->tgtype))
			ereport(ERROR,
					(errcode(ERRCODE_WRONG_OBJECT_TYPE),
					 errmsg("table \"%s\" has a BEFORE ROW trigger \"%s\"",
							my_table, trigger->tgname),
					 errdetail("It could change what is folded."),
					 errhint("Make it an AFTER trigger, or ALTER TABLE %s DISABLE TRIGGER %s.",
							 my_table, name)));
		if (trigger->tgenabled == TRIGGER_FIRES_ON_ORIGIN &&
			!is_wake_trigger(trigger))
			ereport(ERROR,
					(errcode(ERRCODE_WRONG_OBJECT_TYPE),
					 errmsg("table \"%s\" has a trigger \"%s\" that a fold would fire",
							my_table, trigger->tgname),
					 errdetail("A table with foreign keys, deferrable constraints or ALWAYS triggers is folded with its triggers enabled, as its owner."),
					 errhint("Drop the trigger, or ALTER TABLE %s DISABLE TRIGGER %s, or let the fold fire it: ENABLE ALWAYS TRIGGER %s.",
							 my_table, name, name)));
	}
	return role;
}

/* Refuse to make an index where the table's owner may not. */
static void
check_may_create(Relation rel, const char *command)
{
	if (!DatumGetBool(DirectFunctionCall3(has_schema_privilege_id_id,
										  ObjectIdGetDatum(rel->rd_rel->relowner),
										  ObjectIdGetDatum(rel->rd_rel->relnamespace),
										  CStringGetTextDatum("CREATE"))))
		ereport(ERROR,
				(errcode(ERRCODE_INSUFFICIENT_PRIVILEGE),
				 errmsg("cannot make the index that table \"%s\" needs", my_table),
				 errdetail("Its owner has no CREATE privilege on schema \"%s\".",
						   my_schema),
				 errhint("Grant it, or make the index: %s", command)));
}

/*
 * Look at the table, as its owner where code of the owner's could run.  Returns
 * the command that makes its index, if that is missing.
 *
 * It is marked valid first: what invalidates it from now on is seen by the
 * next share, which looks again.
 */
static char *
look_at_table(Relation rel)
{
	SavedIdentity saved;
	char	   *command;

	if (Counted.relid != RelationGetRelid(rel))
		share_rows = last_share_rows = FIRST_ROWS;	/* it may be another size */
	Counted.ready = false;
	Counted.valid = true;
	Counted.relid = RelationGetRelid(rel);
	check_kind(rel);

	for (int i = 0; i < lengthof(Counted.plans); i++)
	{
		if (Counted.plans[i])
			SPI_freeplan(Counted.plans[i]);
		Counted.plans[i] = NULL;
		Counted.sql[i] = NULL;
	}
	MemoryContextReset(Counted.context);
	Counted.columns = MemoryContextAlloc(Counted.context, sizeof(Column) *
										 RelationGetDescr(rel)->natts);
	Counted.ncolumns = 0;

	SwitchToUntrustedUser(rel->rd_rel->relowner, &saved);
	PushActiveSnapshot(GetTransactionSnapshot());
	command = describe_columns(rel);
	PopActiveSnapshot();
	RestoreUserContext(&saved);

	Counted.replication_role = choose_replication_role(rel);
	Counted.ready = (command == NULL);
	return command;
}

/* Make the index on totals, as the table's owner, and close the table. */
static void
make_index(Relation rel, const char *command)
{
	SavedIdentity saved;
	Oid			owner = rel->rd_rel->relowner;

	check_may_create(rel, command);
	relation_close(rel, NoLock);	/* the command needs it so; the lock stays */
	SwitchToUntrustedUser(owner, &saved);
	run_command(command);
	RestoreUserContext(&saved);
}

/*
 * Open the table and become its owner, under a lock that keeps the table what
 * it is until the transaction ends: ROW EXCLUSIVE conflicts with every command
 * that changes its owner, kind, columns, triggers or rules, and lets writers
 * in.
 *
 * Returns NULL if something was missing and has been made.  The caller is then
 * to commit and call again; otherwise it is to call RestoreUserContext().
 */
static Relation
open_table(SavedIdentity *saved)
{
	static const char *const settings[][2] = {
		/* the range scan over ctid and the index on totals, nothing else */
		{"enable_seqscan", "off"},
		{"enable_tidscan", "on"},
		/* sorting by a collation costs thrice what hashing does */
		{"enable_hashagg", "on"},
		{"enable_sort", "off"},
		/* a join looks up, or hashes */
		{"enable_nestloop", "on"},
		{"enable_hashjoin", "on"},
		{"enable_mergejoin", "off"},
		/* for the keys of one range */
		{"work_mem", "32MB"},
	};
	RangeVar   *name = makeRangeVar(my_schema, "counted", -1);
	Oid			relid = RangeVarGetRelid(name, RowExclusiveLock, true);
	Relation	rel;

	if (!OidIsValid(relid))
	{
		make_table();
		return NULL;
	}
	rel = relation_open(relid, NoLock);
	if (!Counted.valid || !Counted.ready || Counted.relid != relid)
	{
		char	   *command = look_at_table(rel);

		if (command)
		{
			make_index(rel, command);
			return NULL;
		}
	}

	/* Not within the owner's settings, since it is to last. */
	if (SessionReplicationRole != Counted.replication_role)
		SetConfigOption("session_replication_role",
						Counted.replication_role == SESSION_REPLICATION_ROLE_REPLICA ?
						"replica" : "origin", PGC_SUSET, PGC_S_OVERRIDE);

	SwitchToUntrustedUser(rel->rd_rel->relowner, saved);
	for (int i = 0; i < lengthof(settings); i++)
		set_locally(settings[i][0], settings[i][1]);
	if (Cycle.running && tries > 0)
		set_locally("lock_timeout", SEARCH_LOCK_TIMEOUT);
	return rel;
}

/* -------------------------------------------------------------------------
 * Acting as the owner
 * -------------------------------------------------------------------------
 */

/*
 * Act as another role, with none of our own privileges, as VACUUM does for an
 * index expression: whatever code the table's owner has attached to it runs
 * with the owner's rights, cannot change role, and leaves no setting changed.
 *
 * Only a worker whose role could SET ROLE to the owner may do so.  (The server
 * has functions of these names from 16 on.)
 */
static void
SwitchToUntrustedUser(Oid userid, SavedIdentity *saved)
{
	GetUserIdAndSecContext(&saved->userid, &saved->sec_context);
	if (!can_act_as(saved->userid, userid))
		ereport(ERROR,
				(errcode(ERRCODE_INSUFFICIENT_PRIVILEGE),
				 errmsg("role \"%s\" cannot act as \"%s\", who owns \"%s\"",
						GetUserNameFromId(saved->userid, false),
						GetUserNameFromId(userid, false), my_table)));
	SetUserIdAndSecContext(userid,
						   saved->sec_context | SECURITY_RESTRICTED_OPERATION);
	saved->guc_nestlevel = NewGUCNestLevel();
}

static void
RestoreUserContext(const SavedIdentity *saved)
{
	AtEOXact_GUC(false, saved->guc_nestlevel);
	SetUserIdAndSecContext(saved->userid, saved->sec_context);
}
