/* -------------------------------------------------------------------------
 *
 * fold.h
 *		What the three rooms of this worker's job share.
 *
 *			fold.c		the cycle: shares, the fast way, when to go on how
 *			stuck.c		the safe way, careful shares, what is stuck
 *			table.c		the three tables: make, look at, describe, refuse
 *
 * Calls go down this list only.
 *
 * -------------------------------------------------------------------------
 */
#ifndef FOLD_H
#define FOLD_H

#include <signal.h>

#include "access/htup_details.h"
#include "executor/spi.h"
#include "nodes/params.h"
#include "storage/itemptr.h"
#include "worker_spi.h"

#if defined(__GNUC__)
#pragma GCC visibility push(hidden)
#endif

/* -------------------------------------------------------------------------
 * The tables, in table.c
 * -------------------------------------------------------------------------
 */

/*
 * A statement is written once, for tables with any keys and measures: what
 * differs from table to table is a list of columns, or of expressions over
 * them, that table.c makes when it looks at the tables.  These stand for them;
 * as an example, what they are for schema3.counted with the keys page and day
 * and the measures value, summed, and seen, of which the latest is kept.
 */
#define COUNTED		"%1$s"		/* schema3.counted */
#define TOTALS		"%2$s"		/* schema3.total */
#define STUCK		"%3$s"		/* schema3.stuck */
#define KEYS		"%4$s"		/* page, day */
#define KEYS_		"%5$s"		/* page, day,     nothing without keys */
#define MEASURES	"%6$s"		/* value, seen */
#define SUMS		"%7$s"		/* sum(value) AS value, max(seen) AS seen */
#define SAME		"%8$s"		/* max(value) AS value, max(seen) AS seen */
#define NO_SUMS		"%9$s"		/* NULL, NULL */
#define COLUMNS		"%10$s"		/* type, page, day, value, seen */
#define NEW_TOTAL	"%11$s"		/* 'total', page, day, value::bigint, seen */
#define FITS		"%12$s"		/* value BETWEEN ... AND ... */
#define ARBITER		"%13$s"		/* page COLLATE ... text_ops, day date_ops */
#define ADDED		"%14$s"		/* value = total.value + excluded.value, ... */
#define ADDED_FITS	"%15$s"		/* total.value + excluded.value fits */
#define COUNT		"%16$s"		/* value, or NULL if there are keys */
#define PARTS		"%17$s"		/* rows that it takes to hold a sum, _n */
#define PART		"%18$s"		/* value / _n, seen */
#define KEY_SIZE	"%19$s"		/* GREATEST(0, pg_column_size(page), ...) */
#define KEY_NAME	"%20$s"		/* ROW(page, day)::text, shortened */
#define DELTA_		"%21$s"		/* 'delta',       nothing without type */
#define NUM_LISTS	21

/* What a table of this worker's must not have, since a statement has it. */
#define RESERVED_COLUMNS \
	"sqlstate", "reason", "since", "_rows", "_tid", "_marked", "_written", \
	"_count", "_name", "_n", "_i"

/* What is known of the three tables. */
typedef struct CountedTables
{
	const char *name;			/* for messages: app.schema3.counted */
	Oid			counted;
	Oid			total;
	Oid			stuck;
	bool		has_keys;
	bool		has_count;		/* is there one total, with a value? */
	bool		loses_deltas;	/* would a crash empty counted or stuck? */
	Oid			toast;			/* where counted has its long keys, if any */
	const char *overflow;		/* what is said of a sum that does not fit */
	const char *lists[NUM_LISTS];
} CountedTables;

extern const char *table_init(int index);
extern const CountedTables *table_open(bool may_make);
extern void table_close(void);
extern void table_committed(void);
extern void table_forget(void);
extern char *table_statement(const char *format);
extern ParamListInfo table_params(int n, const Oid *types, const Datum *values);
extern SPIPlanPtr table_prepare(const char *sql, ParamListInfo params);
extern void table_run(const char *sql, SPIPlanPtr plan, ParamListInfo params,
					  int expected);
extern int64 table_int64(int n);
extern void table_set(const char *name, const char *value);

/* -------------------------------------------------------------------------
 * The safe way, and what is stuck, in stuck.c
 * -------------------------------------------------------------------------
 */

/*
 * A place in a table.  Rows are numbered through, with as many numbers for
 * each block as it can have rows, so half of a range is simple arithmetic.
 */
typedef uint64 Position;

#define ROWS_PER_BLOCK		(MaxHeapTuplesPerPage + 1)
#define BLOCK_START(block)	((Position) (block) * ROWS_PER_BLOCK)

/* The same as a parameter of a statement, kept in *tid. */
static inline Datum
position_tid(Position position, ItemPointerData *tid)
{
	ItemPointerSet(tid, position / ROWS_PER_BLOCK, position % ROWS_PER_BLOCK);
	return PointerGetDatum(tid);
}

/* What a share has done, if it is committed. */
typedef struct ShareResult
{
	int64		rows;			/* deltas that it has folded */
	int64		totals;			/* totals that it has written */
	int64		count;			/* the one total, if there are no keys */
	int64		moved;			/* rows that it has written to stuck */
	bool		went_through;	/* has anything? */
	bool		held;			/* does somebody hold what it was to fold? */
	bool		left;			/* did keys fail by what may be the table's
								 * fault? */
	WorkerError left_error;		/* of the first that did; sqlstate 0 if none
								 * did */
	WorkerError unmoved_error;	/* of the first that cannot even be moved;
								 * same */
} ShareResult;

/*
 * Whether stuck is being read to see which keys are there, and how long the
 * share has done that: a smaller one would read as much.
 */
extern volatile sig_atomic_t stuck_is_read;
extern volatile sig_atomic_t stuck_read_ms;

extern void stuck_init(void);
extern void stuck_begin_share(void);
extern void stuck_move_long_keys(Position from, Position to, bool carefully,
								 ShareResult *result);
extern void stuck_fold_range(const CountedTables *tables, Position from,
							 Position to, bool any_stuck, ShareResult *result);
extern bool stuck_is_key_error(int sqlstate);
extern void stuck_fold_carefully(const CountedTables *tables, Position from,
								 Position to, bool any_stuck, bool may_move,
								 ShareResult *result);
extern void stuck_retry(const CountedTables *tables, Position from,
						Position to, ShareResult *result);
extern int64 stuck_count(WorkerError *oldest);
extern void stuck_committed(const CountedTables *tables);
extern void stuck_end_cycle(const char *name);

#if defined(__GNUC__)
#pragma GCC visibility pop
#endif

#endif							/* FOLD_H */
