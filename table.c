/* -------------------------------------------------------------------------
 *
 * table.c
 *		The three tables of a worker: making them, looking at them, and
 *		refusing what cannot be folded.
 *
 *			schemaN.counted		deltas, and nothing else
 *			the totals			a child of it: schemaN.total, or whatever one
 *								table inherits it
 *			schemaN.stuck		the other child: deltas that cannot be folded
 *
 * A share begins with table_open().  It locks the tables, so that they stay
 * what they are until the transaction ends, and acts as their owner until
 * table_close().  In between, the other rooms have one description of them,
 * which nobody else changes: mostly the lists of columns that the statements
 * are made of, each written by one function below.
 *
 * The description is kept from share to share.  The relcache tells when a
 * table changes, and the next share looks again.
 *
 * Copyright (c) 2026, worker_spi contributors
 *
 * -------------------------------------------------------------------------
 */

#include "postgres.h"

#include "access/genam.h"
#include "access/htup_details.h"
#include "access/relation.h"
#include "access/transam.h"
#include "access/xact.h"
#include "catalog/namespace.h"
#include "catalog/pg_am.h"
#include "catalog/pg_collation.h"
#include "catalog/pg_constraint.h"
#include "catalog/pg_inherits.h"
#include "catalog/pg_namespace.h"
#include "catalog/pg_proc.h"
#include "catalog/pg_publication.h"
#include "catalog/pg_sequence.h"
#include "catalog/pg_trigger.h"
#include "catalog/pg_type.h"
#include "commands/dbcommands.h"
#include "commands/defrem.h"
#include "commands/trigger.h"
#include "executor/spi.h"
#include "fmgr.h"
#include "miscadmin.h"
#include "nodes/makefuncs.h"
#include "nodes/nodeFuncs.h"
#include "optimizer/optimizer.h"
#include "parser/parse_param.h"
#include "pgstat.h"
#include "rewrite/rewriteHandler.h"
#include "storage/lmgr.h"
#include "utils/acl.h"
#include "utils/builtins.h"
#include "utils/fmgroids.h"
#include "utils/fmgrprotos.h"
#include "utils/guc.h"
#include "utils/inval.h"
#include "utils/lsyscache.h"
#include "utils/memutils.h"
#include "utils/rel.h"
#include "utils/ruleutils.h"
#include "utils/snapmgr.h"
#include "utils/syscache.h"
#include "utils/typcache.h"
#include "fold.h"

/* -------------------------------------------------------------------------
 * The commands that make a table
 * -------------------------------------------------------------------------
 */

/*
 * The deltas are a queue: as many rows die as are inserted.  By default,
 * autovacuum would wait until a fifth of the table is dead, so the larger a
 * burst has made it, the longer, and would pause while it works.  To analyze
 * it would read its children, the totals among them.  And without a replica
 * identity, a publication for all tables would keep rows from being deleted.
 */
static const char *const make_counted[] = {
	"CREATE TABLE %1$s.counted ("
	"type text NOT NULL DEFAULT 'delta', value bigint NOT NULL)"
	" USING heap"
	" WITH (autovacuum_vacuum_scale_factor = 0,"
	" autovacuum_vacuum_threshold = 10000,"
	" autovacuum_vacuum_cost_delay = 0,"
	" autovacuum_analyze_threshold = 2147483647)",
	"ALTER TABLE %1$s.counted REPLICA IDENTITY FULL",
	NULL
};

/* Half of each page is for new versions of its totals. */
static const char *const make_total[] = {
	"CREATE TABLE %1$s.total (PRIMARY KEY (type)) INHERITS (%1$s.counted)"
	" USING heap WITH (fillfactor = 50)",
	NULL
};

static const char *const make_stuck[] = {
	"CREATE TABLE %1$s.stuck ("
	"sqlstate text, reason text, since timestamp with time zone)"
	" INHERITS (%1$s.counted) USING heap",
	"ALTER TABLE %1$s.stuck REPLICA IDENTITY FULL",
	NULL
};

/* With this path a name in a statement means what it says. */
#define SEARCH_PATH "pg_catalog, pg_temp"

/* -------------------------------------------------------------------------
 * Types and state
 * -------------------------------------------------------------------------
 */

/* What a statement needs to know of the type of a measure. */
typedef struct MeasureType
{
	Oid			oid;
	const char *name;
	const char *lowest;			/* of what is summed */
	const char *highest;
	const char *overflow;		/* the server's own message */
} MeasureType;

static const MeasureType measure_types[] = {
	{INT8OID, "bigint", "-9223372036854775808", "9223372036854775807", "bigint out of range"},
	{INT4OID, "integer", "-2147483648", "2147483647", "integer out of range"},
	{DATEOID, "date", "", "", ""},
	{TIMESTAMPOID, "timestamp", "", "", ""},
	{TIMESTAMPTZOID, "timestamp with time zone", "", "", ""},
};

/*
 * What can be done with a measure: the default by which it is known, which
 * changes nothing, the aggregate over all deltas of a key, and what adds that
 * to a total.
 */
typedef struct MeasureKind
{
	const char *neutral;
	const char *aggregate;
	const char *function;		/* NULL: it is summed */
} MeasureKind;

static const MeasureKind measure_kinds[] = {
	{"0", "sum", NULL},
	{"-infinity", "max", "GREATEST"},
	{"infinity", "min", "LEAST"},
};

/* A column of counted. */
typedef enum ColumnRole
{
	COLUMN_TYPE,				/* the one of that name */
	COLUMN_MEASURE,
	COLUMN_KEY,
	COLUMN_OTHER				/* none of these: cannot be folded */
} ColumnRole;

typedef struct Column
{
	ColumnRole	role;
	const char *attname;
	const char *name;			/* the same, quoted */
	bool		nullable;
	bool		varlena;		/* can it be of any length? */
	bool		may_be_key;		/* of COLUMN_OTHER: for a hint to propose */
	const char *lacks;			/* of COLUMN_OTHER: what a measure has */
	const MeasureKind *kind;	/* of a measure */
	const MeasureType *type;	/* the same */
} Column;

/* What to put back when the worker stops acting as somebody else. */
typedef struct Identity
{
	Oid			userid;
	int			sec_context;
	int			guc_nestlevel;
} Identity;

static char my_schema[NAMEDATALEN];
static char my_database[NAMEDATALEN];
static char my_name[3 * NAMEDATALEN];

/*
 * The description.  The relcache callback clears valid at any time, also while
 * the tables are being looked at; the next share then looks again.
 */
static CountedTables Described;
static bool valid = false;		/* has nothing changed since we looked? */
static bool complete = false;	/* have we looked to the end? */
static MemoryContext description_context;	/* holds all that it points to */

/* The columns of counted; in description_context. */
static Column *columns;
static int	ncolumns;
static const char *arbiter;		/* those of the keys, as their index has them */

static Identity worker_identity;	/* while we act as the owner */

/* What this share has made, for the log; three at most. */
static const char *made[3];
static int	num_made = 0;

static bool look_at_tables(Relation counted, bool may_make);
static void check_ordinary(Relation rel);
static void find_children(Relation counted);
static Relation open_child(Oid relid, Relation counted);
static void describe_columns(Relation counted);
static void find_keys(Relation total);
static void check_total(Relation total);
static void check_stuck(Relation stuck);
static void check_triggers(Relation rel, int events);
static void check_replica_identity(Relation rel, bool updated);
static void write_lists(Relation total);
static void make_schema_and_counted(void);
static void make_children(Relation counted, bool may_make);
static Column *first_column(ColumnRole role);
static char *full_name(Oid relid);
static char *quoted_name(Oid relid);
static void act_as(Oid role, const char *what, Identity *before);
static void act_as_before(const Identity *before);
static void invalidate(Datum arg, Oid relid);

/* -------------------------------------------------------------------------
 * What the other rooms call
 * -------------------------------------------------------------------------
 */

/*
 * Prepare to work on the tables of worker number index.  Once per process,
 * outside any transaction.  Returns the name of the first of them, for the
 * log: as many databases may have a schema1, it begins with the database's.
 */
const char *
table_init(int index)
{
	StartTransactionCommand();
	strlcpy(my_database, get_database_name(MyDatabaseId), sizeof(my_database));
	CommitTransactionCommand();

	snprintf(my_schema, sizeof(my_schema), "schema%d", index);
	snprintf(my_name, sizeof(my_name), "%s.%s.counted", my_database, my_schema);
	description_context = AllocSetContextCreate(TopMemoryContext,
												"worker_spi tables",
												ALLOCSET_SMALL_SIZES);
	CacheRegisterRelcacheCallback(invalidate, (Datum) 0);
	return my_name;
}

/*
 * Open the three tables, under locks that keep them what they are until the
 * transaction ends, and act as their owner from here on: ROW EXCLUSIVE
 * conflicts with every command that changes a table's owner, kind, columns,
 * triggers or rules, and lets writers in.  A snapshot must come after the
 * locks, or it would miss changes.
 *
 *		may_make	may those that are missing be made?
 *
 * Returns NULL if tables were made: the caller is then to commit, and to call
 * again.  Otherwise it is to call table_close().
 *
 * Errors: 42P01 if a table is missing and may not be made, 55P03 if a lock is
 * not to be had in time, and those of look_at_tables().
 */
const CountedTables *
table_open(bool may_make)
{
	RangeVar   *name = makeRangeVar(my_schema, "counted", -1);
	Oid			relid;
	Relation	counted;
	bool		found = true;

	num_made = 0;
	relid = RangeVarGetRelid(name, RowExclusiveLock, true);
	if (!OidIsValid(relid))
	{
		if (!may_make)
			ereport(ERROR,
					(errcode(ERRCODE_UNDEFINED_TABLE),
					 errmsg("table \"%s\" does not exist", my_name),
					 errhint("To have it made, stop the worker and launch it again.")));
		make_schema_and_counted();
		relid = RangeVarGetRelid(name, RowExclusiveLock, false);
	}

	/* If a change comes in with the locks, they may be on other tables. */
	if (valid && complete && relid == Described.counted)
	{
		LockRelationOid(Described.total, RowExclusiveLock);
		LockRelationOid(Described.stuck, RowExclusiveLock);
	}
	counted = relation_open(relid, NoLock);
	if (!valid || !complete || relid != Described.counted)
		found = look_at_tables(counted, may_make);
	if (found)
	{
		act_as(counted->rd_rel->relowner, my_name, &worker_identity);
		table_set("work_mem", "32MB");	/* for the keys of one share */
	}
	relation_close(counted, NoLock);
	return found ? &Described : NULL;
}

/* Stop acting as the owner.  The locks stay until the transaction ends. */
void
table_close(void)
{
	act_as_before(&worker_identity);
}

/* The share is committed: say what it has made. */
void
table_committed(void)
{
	for (int i = 0; i < num_made; i++)
		ereport(LOG,
				(errmsg("%s made table %s.%s.%s", MyBgworkerEntry->bgw_name,
						my_database, my_schema, made[i])));
	num_made = 0;
}

/* Look at the tables again before the next share: a name may be out of date. */
void
table_forget(void)
{
	valid = false;
}

/* -------------------------------------------------------------------------
 * Running a statement
 * -------------------------------------------------------------------------
 */

/*
 * The text of a statement for these tables, from a format with the lists of
 * fold.h in it.
 */
char *
table_statement(const char *format)
{
	const char *const *l = Described.lists;

	/*
	 * The server's printf does not take a list of arguments of which some are
	 * not asked for.  Ask for nothing of each.
	 */
	format = psprintf("%s%s", format,
					  "%1$.0s%2$.0s%3$.0s%4$.0s%5$.0s%6$.0s%7$.0s%8$.0s"
					  "%9$.0s%10$.0s%11$.0s%12$.0s%13$.0s%14$.0s%15$.0s"
					  "%16$.0s%17$.0s%18$.0s%19$.0s%20$.0s%21$.0s");
	return psprintf(format, l[0], l[1], l[2], l[3], l[4], l[5], l[6], l[7],
					l[8], l[9], l[10], l[11], l[12], l[13], l[14], l[15],
					l[16], l[17], l[18], l[19], l[20]);
}

/*
 * Refuse a statement that names another table than those that we have locked.
 *
 * A lock keeps a table from being renamed or replaced, but not its schema.
 * Somebody who renames that, and has a table of the same name ready in a new
 * one, would have its triggers run as the owner of the first.  The parser
 * calls this for each column reference, before any code of a table can run; so
 * each statement has a reference where it names a table.
 */
static Node *
check_statement_tables(ParseState *pstate, ColumnRef *cref)
{
	ListCell   *lc;

	foreach(lc, pstate->p_rtable)
	{
		RangeTblEntry *rte = lfirst_node(RangeTblEntry, lc);

		if (rte->rtekind == RTE_RELATION && rte->relid != Described.counted &&
			rte->relid != Described.total && rte->relid != Described.stuck)
			ereport(ERROR,
					(errcode(ERRCODE_OBJECT_IN_USE),
					 errmsg("a table of \"%s\" was replaced while it was being folded",
							my_name)));
	}
	return NULL;				/* let the parser go on as usual */
}

static void
setup_parser(ParseState *pstate, void *arg)
{
	ParamListInfo params = (ParamListInfo) arg;
	Oid		   *types = palloc(Max(params->numParams, 1) * sizeof(Oid));

	for (int i = 0; i < params->numParams; i++)
		types[i] = params->params[i].ptype;
	setup_parse_fixed_parameters(pstate, types, params->numParams);
	pstate->p_pre_columnref_hook = check_statement_tables;
}

/* Parameters for a statement, none of them NULL. */
ParamListInfo
table_params(int n, const Oid *types, const Datum *values)
{
	ParamListInfo params = makeParamList(n);

	for (int i = 0; i < n; i++)
	{
		params->params[i].value = values[i];
		params->params[i].isnull = false;
		params->params[i].pflags = PARAM_FLAG_CONST;
		params->params[i].ptype = types[i];
	}
	params->parserSetup = setup_parser;
	params->parserSetupArg = params;
	return params;
}

/* Plan a statement, with parameters of the types of these, for this share. */
SPIPlanPtr
table_prepare(const char *sql, ParamListInfo params)
{
	SPIPrepareOptions options = {
		.parserSetup = setup_parser,
		.parserSetupArg = params,
		.cursorOptions = CURSOR_OPT_GENERIC_PLAN
	};
	SPIPlanPtr	plan = SPI_prepare_extended(sql, &options);

	if (plan == NULL)
		elog(ERROR, "SPI_prepare_extended failed: %s",
			 SPI_result_code_string(SPI_result));
	return plan;
}

/*
 * Run a statement, and show it in pg_stat_activity.
 *
 *		plan		that of the statement, or NULL to plan it for this once
 *		params		its parameters, or NULL if it has none
 *		expected	what SPI has to say of it
 */
void
table_run(const char *sql, SPIPlanPtr plan, ParamListInfo params, int expected)
{
	SPIExecuteOptions options = {0};
	int			rc;

	/* Parameters bring the hook that looks which tables it means. */
	options.params = params ? params : table_params(0, NULL, NULL);

	/* Code of the owner's may have set another since the last statement. */
	if (strcmp(namespace_search_path, SEARCH_PATH) != 0)
		table_set("search_path", SEARCH_PATH);

	pgstat_report_activity(STATE_RUNNING, sql);
	PushActiveSnapshot(GetTransactionSnapshot());
	rc = plan ? SPI_execute_plan_extended(plan, &options) :
		SPI_execute_extended(sql, &options);
	PopActiveSnapshot();
	if (rc != expected)
		elog(ERROR, "could not run a statement: %s", SPI_result_code_string(rc));
}

/* The nth column of the one row that the last statement returned; NULL is 0. */
int64
table_int64(int n)
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
 * Change a setting for as long as we act as somebody else.  Code of the owner's
 * may have changed it before, as a SET does, and GUC_ACTION_SAVE must not come
 * after that: an assertion would fail.
 */
void
table_set(const char *name, const char *value)
{
	(void) set_config_option(name, value, PGC_SUSET, PGC_S_SESSION,
							 GUC_ACTION_SET, true, 0, false);
}

/* -------------------------------------------------------------------------
 * Looking at the tables
 * -------------------------------------------------------------------------
 */

/*
 * Look at the tables, as their owner, and describe them; make those that are
 * missing.  Returns false if some were made.
 *
 * The description is marked as valid first: what invalidates it from now on is
 * seen by the next share, which looks again.  This one is safe all the same,
 * since what matters to it is locked.
 *
 * Errors: 42809 for what is no table, or has what a fold cannot work with;
 * 42P16 for columns and indexes, 42501 for owners, 42P07 for a name that is
 * taken, 42P01 for a table that is missing and may not be made.
 */
static bool
look_at_tables(Relation counted, bool may_make)
{
	Identity	before;
	Relation	total;
	Relation	stuck;

	valid = true;
	complete = false;
	MemoryContextReset(description_context);
	memset(&Described, 0, sizeof(Described));
	Described.name = my_name;
	Described.counted = RelationGetRelid(counted);

	check_ordinary(counted);
	act_as(counted->rd_rel->relowner, my_name, &before);
	describe_columns(counted);

	/* Unless we have this lock, others may make a child while we look. */
	find_children(counted);
	if (may_make &&
		(!OidIsValid(Described.total) || !OidIsValid(Described.stuck)))
	{
		LockRelation(counted, ShareUpdateExclusiveLock);
		find_children(counted);
	}
	total = open_child(Described.total, counted);
	stuck = open_child(Described.stuck, counted);
	check_triggers(counted, TRIGGER_TYPE_DELETE);
	check_replica_identity(counted, false);
	if (total)
	{
		find_keys(total);
		check_total(total);
		check_triggers(total, TRIGGER_TYPE_INSERT | TRIGGER_TYPE_UPDATE);
		check_replica_identity(total, true);
	}
	if (stuck)
	{
		check_stuck(stuck);
		check_triggers(stuck, TRIGGER_TYPE_INSERT | TRIGGER_TYPE_DELETE);
		check_replica_identity(stuck, false);
	}

	/* Nothing is made beside what is refused. */
	if (!total || !stuck)
		make_children(counted, may_make);
	else
	{
		write_lists(total);
		Described.loses_deltas =
			counted->rd_rel->relpersistence == RELPERSISTENCE_UNLOGGED ||
			stuck->rd_rel->relpersistence == RELPERSISTENCE_UNLOGGED;
		for (int i = 0; i < ncolumns; i++)
			if (columns[i].role == COLUMN_KEY && columns[i].varlena)
				Described.toast = counted->rd_rel->reltoastrelid;
		complete = true;
	}
	if (total)
		relation_close(total, NoLock);
	if (stuck)
		relation_close(stuck, NoLock);
	act_as_before(&before);
	return complete;
}

/* How a table is called in messages. */
static char *
full_name(Oid relid)
{
	return psprintf("%s.%s.%s", my_database,
					get_namespace_name(get_rel_namespace(relid)),
					get_rel_name(relid));
}

/* How it is called in a command. */
static char *
quoted_name(Oid relid)
{
	return quote_qualified_identifier(get_namespace_name(get_rel_namespace(relid)),
									  get_rel_name(relid));
}

/* Refuse what is not an ordinary table.  A lock keeps it as it is. */
static void
check_ordinary(Relation rel)
{
	static List *warned = NIL;
	MemoryContext caller_context;

	if (rel->rd_rel->relkind != RELKIND_RELATION || rel->rd_rel->relispartition)
		ereport(ERROR,
				(errcode(ERRCODE_WRONG_OBJECT_TYPE),
				 errmsg("\"%s\" is not an ordinary table", full_name(rel->rd_id)),
				 rel->rd_rel->relispartition ? errdetail("It is a partition.") :
				 errdetail_relkind_not_supported(rel->rd_rel->relkind)));

	/* A fold goes by blocks, and by what an upsert does in a heap. */
	if (rel->rd_rel->relam != HEAP_TABLE_AM_OID)
		ereport(ERROR,
				(errcode(ERRCODE_WRONG_OBJECT_TYPE),
				 errmsg("table \"%s\" does not have the access method \"heap\"",
						full_name(rel->rd_id)),
				 errhint("ALTER TABLE %s SET ACCESS METHOD heap",
						 quoted_name(rel->rd_id))));

	/* ON DELETE DO INSTEAD NOTHING would count the same deltas for ever. */
	if (rel->rd_rules)
		ereport(ERROR,
				(errcode(ERRCODE_WRONG_OBJECT_TYPE),
				 errmsg("table \"%s\" has rules", full_name(rel->rd_id)),
				 errdetail("Deltas cannot be folded where a rule rewrites the statements."),
				 errhint("Drop the rules, or use triggers instead.")));

	if (rel->rd_rel->relpersistence == RELPERSISTENCE_UNLOGGED &&
		!list_member_oid(warned, RelationGetRelid(rel)))
	{
		caller_context = MemoryContextSwitchTo(TopMemoryContext);
		warned = lappend_oid(warned, RelationGetRelid(rel));
		MemoryContextSwitchTo(caller_context);
		ereport(WARNING,
				(errmsg("table \"%s\" is unlogged", full_name(rel->rd_id)),
				 errdetail("A crash of the server empties it, and a standby cannot read it.")));
	}
}

/* Refuse a table that inherits one of ours, and is none. */
static void
refuse_child(Oid child, Oid parent)
{
	ereport(ERROR,
			(errcode(ERRCODE_WRONG_OBJECT_TYPE),
			 errmsg("table \"%s\" inherits \"%s\"", full_name(child),
					full_name(parent)),
			 errdetail("Its rows would be counted and never folded."),
			 errhint("ALTER TABLE %s NO INHERIT %s", quoted_name(child),
					 quoted_name(parent))));
}

/*
 * Find the children of counted, and lock them: stuck by its name, and the
 * totals as the other one.  Rows of a third would be counted, and never
 * folded.
 */
static void
find_children(Relation counted)
{
	List	   *children = find_inheritance_children(RelationGetRelid(counted),
													 RowExclusiveLock);
	Oid			stuck = get_relname_relid("stuck", RelationGetNamespace(counted));
	Oid			total = get_relname_relid("total", RelationGetNamespace(counted));
	ListCell   *lc;

	Described.total = Described.stuck = InvalidOid;
	if (list_member_oid(children, total))
		Described.total = total;
	foreach(lc, children)
	{
		Oid			child = lfirst_oid(lc);

		if (child == stuck)
			Described.stuck = child;
		else if (!OidIsValid(Described.total))
			Described.total = child;
		else if (child != Described.total)
			refuse_child(child, Described.counted);
	}
}

/* Open a child, if there is one, and refuse what it may not be. */
static Relation
open_child(Oid relid, Relation counted)
{
	Relation	rel;
	List	   *children;

	if (!OidIsValid(relid))
		return NULL;
	rel = relation_open(relid, NoLock);
	check_ordinary(rel);
	if (rel->rd_rel->relowner != counted->rd_rel->relowner)
		ereport(ERROR,
				(errcode(ERRCODE_INSUFFICIENT_PRIVILEGE),
				 errmsg("table \"%s\" does not have the owner of \"%s\"",
						full_name(rel->rd_id), my_name),
				 errhint("Change the owner of all three tables: ALTER TABLE ... OWNER TO does not descend to children.")));
	children = find_inheritance_children(relid, NoLock);
	if (children != NIL)
		refuse_child(linitial_oid(children), relid);
	return rel;
}

/* -------------------------------------------------------------------------
 * Columns: type, measures, keys
 * -------------------------------------------------------------------------
 */

static Column *
find_column(const char *attname)
{
	for (int i = 0; i < ncolumns; i++)
	{
		if (strcmp(columns[i].attname, attname) == 0)
			return &columns[i];
	}
	return NULL;
}

/* The first column in a role, or NULL. */
static Column *
first_column(ColumnRole role)
{
	for (int i = 0; i < ncolumns; i++)
	{
		if (columns[i].role == role)
			return &columns[i];
	}
	return NULL;
}

/* The type of a measure, or NULL if a measure cannot have it. */
static const MeasureType *
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
 * What an expression is worth, if that is a constant by the server's own
 * doing, and not NULL; no code of a user's is run to see.
 */
static Const *
constant_value(Node *expr)
{
	Const	   *value;

	if (expr == NULL || calls_foreign_function(expr, NULL))
		return NULL;
	value = (Const *) eval_const_expressions(NULL, expr);
	return IsA(value, Const) && !value->constisnull ? value : NULL;
}

/* Is a sequence behind an expression?  Add it to a list, if it is known. */
static bool
find_sequences(Node *node, void *context)
{
	List	  **sequences = context;

	if (node == NULL)
		return false;
	if (IsA(node, NextValueExpr))
		*sequences = lappend_oid(*sequences, ((NextValueExpr *) node)->seqid);
	else if (IsA(node, FuncExpr) && ((FuncExpr *) node)->funcid == F_NEXTVAL)
	{
		Const	   *value = constant_value(linitial(((FuncExpr *) node)->args));

		*sequences = lappend_oid(*sequences, value ?
								 DatumGetObjectId(value->constvalue) : InvalidOid);
	}
	return expression_tree_walker(node, find_sequences, context);
}

/* Which kind of measure has this default?  NULL if none has. */
static const MeasureKind *
kind_by_default(Node *expr)
{
	Const	   *value;
	Oid			output;
	bool		isvarlena;
	char	   *text;

	if (expr && IsA(expr, CoerceToDomain))
		expr = (Node *) ((CoerceToDomain *) expr)->arg;
	value = constant_value(expr);
	if (value == NULL)
		return NULL;
	getTypeOutputInfo(value->consttype, &output, &isvarlena);
	text = OidOutputFunctionCall(output, value->constvalue);
	for (int i = 0; i < lengthof(measure_kinds); i++)
	{
		if (strcmp(text, measure_kinds[i].neutral) == 0)
			return &measure_kinds[i];
	}
	return NULL;
}

/*
 * A column that is no measure: say what it lacks, and whether a hint may
 * propose it as a key.  What a sequence fills would make each delta a counter
 * of its own, and so would a measure that is declared wrong.
 */
static void
describe_other(Column *column, Form_pg_attribute att, Node *expr,
			   const MeasureKind *kind)
{
	List	   *sequences = NIL;
	char		category;
	bool		preferred;

	get_type_category_preferred(getBaseType(att->atttypid), &category, &preferred);
	(void) find_sequences(expr, &sequences);
	if (sequences != NIL)
		column->lacks = "It is filled by a sequence.";
	else if (!OidIsValid(GetDefaultOpClass(att->atttypid, BTREE_AM_OID)))
		column->lacks = "Its type has no order, which a key needs.";
	else if (kind && (category == TYPCATEGORY_NUMERIC ||
					  category == TYPCATEGORY_DATETIME))
		column->lacks = measure_type(att->atttypid) ?
			"It would be a measure if it were NOT NULL." :
			"It would be a measure if it were of type bigint, integer, date, timestamp or timestamptz.";
	else
	{
		column->may_be_key = true;
		if (!measure_type(att->atttypid))
			column->lacks = "It has no type that a measure can have.";
		else
			column->lacks = category == TYPCATEGORY_NUMERIC ?
				(att->attnotnull ? "It would be a measure if it had DEFAULT 0." :
				 "It would be a measure if it were NOT NULL and had DEFAULT 0.") :
				(att->attnotnull ? "It would be a measure if it had DEFAULT '-infinity' or 'infinity'." :
				 "It would be a measure if it were NOT NULL and had DEFAULT '-infinity' or 'infinity'.");
	}
}

/* Describe one column of counted, but for whether it is a key. */
static void
describe_column(Relation counted, Form_pg_attribute att)
{
	static const char *const reserved[] = {RESERVED_COLUMNS};
	Column	   *column = &columns[ncolumns++];
	const char *name = NameStr(att->attname);
	const MeasureType *type = measure_type(att->atttypid);
	const MeasureKind *kind;
	Node	   *expr;

	for (int i = 0; i < lengthof(reserved); i++)
		if (strcmp(name, reserved[i]) == 0)
			ereport(ERROR,
					(errcode(ERRCODE_INVALID_TABLE_DEFINITION),
					 errmsg("table \"%s\" has a column \"%s\"", my_name, name),
					 errdetail("That name is reserved for table \"stuck\" and for the worker's statements.")));

	memset(column, 0, sizeof(Column));
	column->attname = MemoryContextStrdup(description_context, name);
	column->name = MemoryContextStrdup(description_context,
									   quote_identifier(name));
	column->nullable = !att->attnotnull;
	column->varlena = att->attlen == -1;
	column->type = type;

	if (strcmp(name, "type") == 0 || strcmp(name, "value") == 0)
	{
		bool		is_type = name[0] == 't';

		if (att->attgenerated ||
			(is_type ? att->atttypid != TEXTOID :
			 att->atttypid != INT8OID && att->atttypid != INT4OID))
			ereport(ERROR,
					(errcode(ERRCODE_INVALID_TABLE_DEFINITION),
					 errmsg("column \"%s\" of table \"%s\" has type %s%s", name,
							my_name, format_type_be(att->atttypid),
							att->attgenerated ? " and is generated" : ""),
					 is_type ? errdetail("It must be of type text.") :
					 errdetail("It must be of type bigint or integer.")));
		column->role = is_type ? COLUMN_TYPE : COLUMN_MEASURE;
		column->kind = &measure_kinds[0];
		return;
	}

	expr = att->atthasdef || att->attidentity ?
		build_column_default(counted, att->attnum) : NULL;
	kind = kind_by_default(expr);
	if (kind && type && att->attnotnull)
	{
		column->role = COLUMN_MEASURE;
		column->kind = kind;
	}
	else
	{
		column->role = COLUMN_OTHER;
		describe_other(column, att, expr, kind);
	}
}

static void
describe_columns(Relation counted)
{
	TupleDesc	desc = RelationGetDescr(counted);

	columns = MemoryContextAlloc(description_context,
								 Max(desc->natts, 1) * sizeof(Column));
	ncolumns = 0;
	for (int i = 0; i < desc->natts; i++)
	{
		Form_pg_attribute att = TupleDescAttr(desc, i);
		const char *name = NameStr(att->attname);

		/* What the server computes is neither, but the two by name. */
		if (!att->attisdropped &&
			(!att->attgenerated || strcmp(name, "type") == 0 ||
			 strcmp(name, "value") == 0))
			describe_column(counted, att);
	}

	if (!first_column(COLUMN_TYPE) && !first_column(COLUMN_OTHER))
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_TABLE_DEFINITION),
				 errmsg("table \"%s\" has neither keys nor a column \"type\"",
						my_name)));
	if (!first_column(COLUMN_MEASURE))
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_TABLE_DEFINITION),
				 errmsg("table \"%s\" has no measure", my_name),
				 errdetail("A measure is \"value\", or a NOT NULL column of type bigint or integer with DEFAULT 0, or of type date or timestamp with DEFAULT '-infinity' or 'infinity'.")));
}

/* -------------------------------------------------------------------------
 * Keys: the unique index of the totals
 * -------------------------------------------------------------------------
 */

/*
 * The columns of a unique index, as numbers of columns of counted, or NULL if
 * it cannot be that of the keys.
 */
static Bitmapset *
index_columns(Relation total, Relation index)
{
	Form_pg_index form = index->rd_index;
	Bitmapset  *result = NULL;

	/*
	 * One that is not valid may be a twin that REINDEX is building.
	 * Expressions are not looked at: that could run functions in them.
	 */
	if (!form->indisunique || !form->indisvalid || form->indisexclusion ||
		!heap_attisnull(index->rd_indextuple, Anum_pg_index_indexprs, NULL) ||
		!heap_attisnull(index->rd_indextuple, Anum_pg_index_indpred, NULL))
		return NULL;
	for (int i = 0; i < form->indnkeyatts; i++)
	{
		Form_pg_attribute att = TupleDescAttr(RelationGetDescr(total),
											  form->indkey.values[i] - 1);
		Column	   *column = find_column(NameStr(att->attname));

		if (column == NULL)
			return NULL;
		result = bms_add_member(result, column - columns);
	}
	return result;
}

static void
refuse_index(Relation total, const char *name, const char *detail)
{
	ereport(ERROR,
			(errcode(ERRCODE_INVALID_TABLE_DEFINITION),
			 errmsg("index \"%s\" cannot be that of the keys of table \"%s\"",
					name, full_name(total->rd_id)),
			 errdetail_internal("%s", detail),
			 errhint("Make one on the key columns alone, with their own collations and default operator classes, not deferrable, and NULLS NOT DISTINCT if they can be NULL.")));
}

/*
 * Check that an index compares keys as GROUP BY does, and write its columns as
 * an arbiter has to have them: with collation and operator class, since
 * another unique index on the same columns may have others.
 */
static void
check_index(Relation total, Relation index)
{
	Form_pg_index form = index->rd_index;
	const char *name = RelationGetRelationName(index);
	StringInfoData list;
	bool		nullable = false;

	if (index->rd_rel->relam != BTREE_AM_OID)
		refuse_index(total, name, "It is no B-tree.");
	initStringInfo(&list);
	for (int i = 0; i < form->indnkeyatts; i++)
	{
		Form_pg_attribute att = TupleDescAttr(RelationGetDescr(total),
											  form->indkey.values[i] - 1);
		Oid			opclass = GetDefaultOpClass(att->atttypid, BTREE_AM_OID);
		Oid			collation = index->rd_indcollation[i];

		if (!OidIsValid(opclass) ||
			index->rd_opfamily[i] != get_opclass_family(opclass) ||
			collation != att->attcollation)
			refuse_index(total, name, "It does not compare keys as their columns do.");
		if (!OidIsValid(lookup_type_cache(att->atttypid, TYPECACHE_EQ_OPR)->eq_opr))
			refuse_index(total, name, psprintf("Keys of type %s cannot be compared.",
											   format_type_be(att->atttypid)));
		nullable |= !att->attnotnull;

		appendStringInfo(&list, "%s%s", i > 0 ? ", " : "",
						 quote_identifier(NameStr(att->attname)));
		if (OidIsValid(collation))
			appendStringInfo(&list, " COLLATE %s", generate_collation_name(collation));
		appendStringInfo(&list, " %s", generate_opclass_name(opclass));
	}
	if (nullable && !form->indnullsnotdistinct)
		refuse_index(total, name, "Its keys can be NULL, and it takes NULLs for distinct.");
	arbiter = MemoryContextStrdup(description_context, list.data);
}

/*
 * Find the unique index of the totals that tells their keys: the primary key
 * if its columns are all columns of counted, or else the only index of which
 * that is so.  Returns NULL if there is none, and its columns in *keys.
 */
static Relation
find_key_index(Relation total, Bitmapset **keys)
{
	Relation	found = NULL;
	const char *deferrable = NULL;
	Bitmapset  *deferrable_keys = NULL;
	ListCell   *lc;

	foreach(lc, RelationGetIndexList(total))
	{
		Relation	index = index_open(lfirst_oid(lc), AccessShareLock);
		Bitmapset  *these = index_columns(total, index);

		if (these && !index->rd_index->indimmediate)
		{
			deferrable = pstrdup(RelationGetRelationName(index));
			deferrable_keys = these;
		}
		else if (these && (!found || index->rd_index->indisprimary))
		{
			if (found)
				index_close(found, NoLock);
			found = index;
			*keys = these;
			continue;
		}
		index_close(index, NoLock);
	}
	if (deferrable && (!found || bms_equal(*keys, deferrable_keys)))
		refuse_index(total, deferrable, "It is deferrable.");
	return found;
}

/* Refuse a second index that could be that of the keys. */
static void
refuse_second_index(Relation total, Relation found)
{
	ListCell   *lc;

	foreach(lc, RelationGetIndexList(total))
	{
		Relation	index = index_open(lfirst_oid(lc), AccessShareLock);
		Bitmapset  *these = index_columns(total, index);

		if (these && RelationGetRelid(index) != RelationGetRelid(found) &&
			(!found->rd_index->indisprimary ||
			 (bms_num_members(these) == 1 &&
			  columns[bms_singleton_member(these)].role == COLUMN_TYPE)))
			ereport(ERROR,
					(errcode(ERRCODE_INVALID_TABLE_DEFINITION),
					 errmsg("indexes \"%s\" and \"%s\" of table \"%s\" could both be that of its keys",
							RelationGetRelationName(found),
							RelationGetRelationName(index), full_name(total->rd_id)),
					 errhint("Drop one of them, or make the one on the key columns the primary key.")));
		index_close(index, NoLock);
	}
}

/*
 * What a hint proposes as the index of the keys.  The totals, if they are
 * there, may have a primary key on other columns; the index that the hint drops
 * is none of those.
 */
static char *
key_constraint(Relation total, Oid dropped)
{
	StringInfoData keys;
	bool		nullable = false;

	initStringInfo(&keys);
	for (int i = 0; i < ncolumns; i++)
	{
		if (columns[i].role != COLUMN_KEY && !columns[i].may_be_key)
			continue;
		appendStringInfo(&keys, "%s%s", keys.len > 0 ? ", " : "",
						 columns[i].name);
		nullable |= columns[i].nullable;
	}
	return psprintf(nullable ? "UNIQUE NULLS NOT DISTINCT (%s)" :
					total && OidIsValid(total->rd_pkindex) &&
					total->rd_pkindex != dropped ? "UNIQUE (%s)" :
					"PRIMARY KEY (%s)", keys.len > 0 ? keys.data : "type");
}

/* Refuse a column that is neither key nor measure. */
static void
refuse_other(const Column *column, const char *command)
{
	ereport(ERROR,
			(errcode(ERRCODE_INVALID_TABLE_DEFINITION),
			 errmsg("column \"%s\" of table \"%s\" is neither a key nor a measure",
					column->attname, my_name),
			 errdetail_internal("%s", column->lacks),
			 command ? errhint("To make it a key: %s", command) :
			 errhint("Drop it, or make it a measure.")));
}

/*
 * Find out which columns are keys.  Those of an index on type are none: there
 * is one total then.
 */
static void
find_keys(Relation total)
{
	char	   *table = quoted_name(total->rd_id);
	Bitmapset  *keys = NULL;
	Relation	index = find_key_index(total, &keys);
	Oid			constraint;
	Column	   *other;
	int			i = -1;

	if (!index)
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_TABLE_DEFINITION),
				 errmsg("table \"%s\" has no unique index that tells its keys",
						full_name(total->rd_id)),
				 errhint("To make one: ALTER TABLE %s ADD %s", table,
						 key_constraint(total, InvalidOid))));
	while ((i = bms_next_member(keys, i)) >= 0)
	{
		if (columns[i].role == COLUMN_MEASURE)
			refuse_index(total, RelationGetRelationName(index),
						 psprintf("Column \"%s\" is a measure.", columns[i].attname));
		if (columns[i].role == COLUMN_TYPE && bms_num_members(keys) > 1)
			refuse_index(total, RelationGetRelationName(index),
						 "Column \"type\" is never a key.");
		if (columns[i].role == COLUMN_OTHER)
		{
			columns[i].role = COLUMN_KEY;
			Described.has_keys = true;
		}
	}
	check_index(total, index);
	refuse_second_index(total, index);

	other = first_column(COLUMN_OTHER);
	constraint = get_index_constraint(RelationGetRelid(index));
	if (other && other->may_be_key && OidIsValid(constraint))
		refuse_other(other, psprintf("ALTER TABLE %s DROP CONSTRAINT %s, ADD %s",
									 table, quote_identifier(RelationGetRelationName(index)),
									 key_constraint(total, index->rd_id)));
	if (other && other->may_be_key)
		refuse_other(other, psprintf("DROP INDEX %s; ALTER TABLE %s ADD %s",
									 quoted_name(index->rd_id),
									 table, key_constraint(total, InvalidOid)));
	if (other)
		refuse_other(other, NULL);
	index_close(index, NoLock);
}

/* -------------------------------------------------------------------------
 * What else the tables may not have
 * -------------------------------------------------------------------------
 */

/*
 * A column that only a child has gets its default.  Each total that is written
 * takes a number from a sequence, also where the upsert then finds one that is
 * there, so a narrow one would run out.
 */
static void
check_own_columns(Relation rel)
{
	TupleDesc	desc = RelationGetDescr(rel);

	for (int i = 0; i < desc->natts; i++)
	{
		Form_pg_attribute att = TupleDescAttr(desc, i);
		Column	   *column = find_column(NameStr(att->attname));
		List	   *sequences = NIL;
		ListCell   *lc;
		Node	   *expr;

		if (att->attisdropped)
			continue;
		if (column && att->attgenerated)
			ereport(ERROR,
					(errcode(ERRCODE_INVALID_TABLE_DEFINITION),
					 errmsg("column \"%s\" of table \"%s\" is a generated column",
							column->attname, full_name(rel->rd_id))));
		if (column || att->attgenerated)
			continue;

		expr = build_column_default(rel, att->attnum);
		if (att->attnotnull && expr == NULL)
			ereport(ERROR,
					(errcode(ERRCODE_INVALID_TABLE_DEFINITION),
					 errmsg("column \"%s\" of table \"%s\" is NOT NULL and has no default",
							NameStr(att->attname), full_name(rel->rd_id)),
					 errhint("Let it take NULL, or give it a default.")));
		(void) find_sequences(expr, &sequences);
		foreach(lc, sequences)
		{
			HeapTuple	tuple = SearchSysCache1(SEQRELID,
												ObjectIdGetDatum(lfirst_oid(lc)));
			bool		narrow = att->atttypid == INT2OID || att->atttypid == INT4OID;

			if (HeapTupleIsValid(tuple))
			{
				narrow |= ((Form_pg_sequence) GETSTRUCT(tuple))->seqtypid != INT8OID;
				ReleaseSysCache(tuple);
			}
			if (narrow)
				ereport(ERROR,
						(errcode(ERRCODE_INVALID_TABLE_DEFINITION),
						 errmsg("column \"%s\" of table \"%s\" takes its default from a sequence that would run out",
								NameStr(att->attname), full_name(rel->rd_id)),
						 errdetail("Each total that is written takes a number."),
						 errhint("ALTER TABLE %s ALTER %s TYPE bigint; ALTER SEQUENCE %s AS bigint",
								 quoted_name(rel->rd_id),
								 quote_identifier(NameStr(att->attname)),
								 OidIsValid(lfirst_oid(lc)) ?
								 quoted_name(lfirst_oid(lc)) : "...")));
		}
	}
}

/* Put 'total' where an expression has the column type of the totals. */
static Node *
assume_total(Node *node, void *context)
{
	if (node == NULL)
		return NULL;
	if (IsA(node, Var))
		return (Node *) makeConst(TEXTOID, -1, ((Var *) node)->varcollid, -1,
								  CStringGetTextDatum("total"), false, false);
	return expression_tree_mutator(node, assume_total, context);
}

/*
 * The totals: a constraint that forbids the type of a new one would make each
 * of them stuck.
 */
static void
check_total(Relation total)
{
	TupleConstr *constr = RelationGetDescr(total)->constr;
	AttrNumber	type = get_attnum(RelationGetRelid(total), "type");

	check_own_columns(total);
	for (int i = 0; constr && find_column("type") && i < constr->num_check; i++)
	{
		Node	   *expr = stringToNode(constr->check[i].ccbin);
		Bitmapset  *attnos = NULL;
		Const	   *value;

		pull_varattnos(expr, 1, &attnos);
		if (!bms_equal(attnos, bms_make_singleton(type - FirstLowInvalidHeapAttributeNumber)))
			continue;
		value = constant_value(assume_total(expr, NULL));
		if (value && !DatumGetBool(value->constvalue))
			ereport(ERROR,
					(errcode(ERRCODE_INVALID_TABLE_DEFINITION),
					 errmsg("constraint \"%s\" of table \"%s\" forbids totals",
							constr->check[i].ccname, full_name(total->rd_id)),
					 errdetail("A new total has type 'total'.")));
	}
}

/*
 * What cannot be folded must find a place in stuck, so nothing there may
 * refuse it but what has let it into counted.
 */
static void
check_stuck(Relation stuck)
{
	static const struct
	{
		const char *name;
		Oid			type;
	}			wanted[] = {
		{"sqlstate", TEXTOID}, {"reason", TEXTOID}, {"since", TIMESTAMPTZOID}
	};
	Relation	constraints;
	SysScanDesc scan;
	ScanKeyData key;
	HeapTuple	tuple;

	for (int i = 0; i < lengthof(wanted); i++)
	{
		AttrNumber	attnum = get_attnum(RelationGetRelid(stuck), wanted[i].name);

		if (attnum == InvalidAttrNumber ||
			TupleDescAttr(RelationGetDescr(stuck), attnum - 1)->atttypid != wanted[i].type)
			ereport(ERROR,
					(errcode(ERRCODE_INVALID_TABLE_DEFINITION),
					 errmsg("table \"%s\" has no column \"%s\" of type %s",
							full_name(stuck->rd_id), wanted[i].name,
							format_type_be(wanted[i].type)),
					 errhint("To have it made anew, drop it, stop the worker and launch it again.")));
	}
	check_own_columns(stuck);
	for (int i = 0; i < ncolumns; i++)
	{
		AttrNumber	attnum = get_attnum(RelationGetRelid(stuck), columns[i].attname);

		if (columns[i].nullable &&
			TupleDescAttr(RelationGetDescr(stuck), attnum - 1)->attnotnull)
			ereport(ERROR,
					(errcode(ERRCODE_WRONG_OBJECT_TYPE),
					 errmsg("column \"%s\" of table \"%s\" is NOT NULL, and may be NULL in \"%s\"",
							columns[i].attname, full_name(stuck->rd_id), my_name),
					 errdetail("It could keep rows from being moved there."),
					 errhint("ALTER TABLE %s ALTER %s DROP NOT NULL",
							 quoted_name(stuck->rd_id), columns[i].name)));
	}
	if (RelationGetIndexList(stuck) != NIL)
		ereport(ERROR,
				(errcode(ERRCODE_WRONG_OBJECT_TYPE),
				 errmsg("table \"%s\" has an index", full_name(stuck->rd_id)),
				 errdetail("It could keep rows from being moved there."),
				 errhint("Drop index \"%s\".",
						 get_rel_name(linitial_oid(RelationGetIndexList(stuck))))));

	ScanKeyInit(&key, Anum_pg_constraint_conrelid, BTEqualStrategyNumber, F_OIDEQ,
				ObjectIdGetDatum(RelationGetRelid(stuck)));
	constraints = relation_open(ConstraintRelationId, AccessShareLock);
	scan = systable_beginscan(constraints, ConstraintRelidTypidNameIndexId,
							  true, NULL, 1, &key);
	while ((tuple = systable_getnext(scan)) != NULL)
	{
		Form_pg_constraint constraint = (Form_pg_constraint) GETSTRUCT(tuple);

		if (constraint->coninhcount == 0)
			ereport(ERROR,
					(errcode(ERRCODE_WRONG_OBJECT_TYPE),
					 errmsg("table \"%s\" has a constraint \"%s\" of its own",
							full_name(stuck->rd_id), NameStr(constraint->conname)),
					 errdetail("It could keep rows from being moved there."),
					 errhint("Drop it.")));
	}
	systable_endscan(scan);
	relation_close(constraints, AccessShareLock);
}

/*
 * Refuse a foreign key that refers to a table and would follow what a fold
 * does there: triggers of the table that it is on would run as our owner.  A
 * key does not change when its total does.
 */
static void
check_foreign_key(Relation rel, const Trigger *trigger)
{
	bool		follows = false;
	HeapTuple	tuple;
	int			nkeys;
	AttrNumber	conkey[INDEX_MAX_KEYS];
	AttrNumber	confkey[INDEX_MAX_KEYS];

	switch (trigger->tgfoid)
	{
		case F_RI_FKEY_CASCADE_DEL:
		case F_RI_FKEY_SETNULL_DEL:
		case F_RI_FKEY_SETDEFAULT_DEL:
			follows = true;
			break;
		case F_RI_FKEY_CASCADE_UPD:
		case F_RI_FKEY_SETNULL_UPD:
		case F_RI_FKEY_SETDEFAULT_UPD:
			tuple = SearchSysCache1(CONSTROID,
									ObjectIdGetDatum(trigger->tgconstraint));
			if (!HeapTupleIsValid(tuple))
				elog(ERROR, "cache lookup failed for constraint %u",
					 trigger->tgconstraint);
			DeconstructFkConstraintRow(tuple, &nkeys, conkey, confkey,
									   NULL, NULL, NULL, NULL, NULL);
			for (int i = 0; i < nkeys; i++)
			{
				Column	   *column =
					find_column(NameStr(TupleDescAttr(RelationGetDescr(rel), confkey[i] - 1)->attname));

				follows |= column == NULL || column->role != COLUMN_KEY;
			}
			ReleaseSysCache(tuple);
			break;
	}
	if (follows)
		ereport(ERROR,
				(errcode(ERRCODE_WRONG_OBJECT_TYPE),
				 errmsg("foreign key \"%s\" of table \"%s\" would follow what a fold does in \"%s\"",
						get_constraint_name(trigger->tgconstraint),
						get_rel_name(trigger->tgconstrrelid), full_name(rel->rd_id)),
				 errhint("Drop it, or make it anew with NO ACTION.")));
}

/*
 * Refuse triggers that a fold would fire and must not.
 *
 * Whoever has the TRIGGER privilege on a table could have code run as its
 * owner; so an ordinary trigger is refused, and only what the owner has
 * enabled ALWAYS is fired.  A BEFORE ROW trigger could change what is folded.
 * No list of columns is looked at: one of a generated column fires with those
 * that this is made of.
 *
 *		events	TRIGGER_TYPE_INSERT and so on: what the statements do
 */
static void
check_triggers(Relation rel, int events)
{
	/* A copy: whenever we read a catalog, the relcache may free its own. */
	TriggerDesc *triggers = CopyTriggerDesc(rel->trigdesc);

	for (int i = 0; triggers && i < triggers->numtriggers; i++)
	{
		Trigger    *trigger = &triggers->triggers[i];
		const char *name = quote_identifier(trigger->tgname);
		char	   *table = quoted_name(rel->rd_id);

		if ((trigger->tgtype & events) == 0)
			continue;
		if (trigger->tgisinternal)
		{
			check_foreign_key(rel, trigger);
			continue;
		}
		if (trigger->tgenabled == TRIGGER_FIRES_ON_ORIGIN)
			ereport(ERROR,
					(errcode(ERRCODE_WRONG_OBJECT_TYPE),
					 errmsg("table \"%s\" has a trigger \"%s\" that a fold would fire",
							full_name(rel->rd_id), trigger->tgname),
					 errhint("ALTER TABLE %s DISABLE TRIGGER %s, or, to have a fold fire it, ENABLE ALWAYS TRIGGER %s.",
							 table, name, name)));
		if (trigger->tgenabled == TRIGGER_FIRES_ALWAYS &&
			TRIGGER_FOR_ROW(trigger->tgtype) && TRIGGER_FOR_BEFORE(trigger->tgtype))
			ereport(ERROR,
					(errcode(ERRCODE_WRONG_OBJECT_TYPE),
					 errmsg("table \"%s\" has a BEFORE ROW trigger \"%s\"",
							full_name(rel->rd_id), trigger->tgname),
					 errdetail("It could change what is folded."),
					 errhint("Make it an AFTER trigger, or ALTER TABLE %s DISABLE TRIGGER %s.",
							 table, name)));
	}
}

/*
 * Where a publication has updates or deletes of a table, the server refuses
 * them without a replica identity.  Its hint does not say which table.
 *
 *		updated		does a fold update the table?  If not, it deletes.
 */
static void
check_replica_identity(Relation rel, bool updated)
{
	PublicationDesc published;

	RelationBuildPublicationDesc(rel, &published);
	if ((updated ? published.pubactions.pubupdate : published.pubactions.pubdelete) &&
		rel->rd_rel->relreplident != REPLICA_IDENTITY_FULL &&
		!OidIsValid(RelationGetReplicaIndex(rel)))
		ereport(ERROR,
				(errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
				 errmsg("table \"%s\" is published and has no replica identity",
						full_name(rel->rd_id)),
				 errhint("ALTER TABLE %s REPLICA IDENTITY FULL",
						 quoted_name(rel->rd_id))));
}

/* -------------------------------------------------------------------------
 * The lists of which the statements are made
 * -------------------------------------------------------------------------
 */

/* In the formats below, what they have of a column. */
#define NAME		"%1$s"
#define AGGREGATE	"%2$s"
#define FUNCTION	"%3$s"
#define TYPE		"%4$s"
#define LOWEST		"%5$s"
#define HIGHEST		"%6$s"

/* Append an item for a column to a list. */
static void
append_column(StringInfo list, const char *separator, const char *format,
			  const Column *column)
{
	bool		summed = column->kind && column->kind->function == NULL;

	/* It does not matter which of them a format has: see table_statement(). */
	format = psprintf("%s%s", format, "%1$.0s%2$.0s%3$.0s%4$.0s%5$.0s%6$.0s");
	if (list->len > 0)
		appendStringInfoString(list, separator);
	appendStringInfo(list, format, column->name,
					 column->kind ? column->kind->aggregate : "",
					 column->kind && !summed ? column->kind->function : "",
					 column->kind ? column->type->name : "",
					 summed ? column->type->lowest : "",
					 summed ? column->type->highest : "");
}

/* A list of the keys. */
static const char *
list_keys(const char *format, const char *separator)
{
	StringInfoData list;

	initStringInfo(&list);
	for (int i = 0; i < ncolumns; i++)
	{
		if (columns[i].role == COLUMN_KEY)
			append_column(&list, separator, format, &columns[i]);
	}
	return list.data;
}

/*
 * A list of the measures: those that are summed in one format, those of which
 * the latest or earliest is kept in another, or not at all.
 */
static const char *
list_measures(const char *summed, const char *kept, const char *separator)
{
	StringInfoData list;

	initStringInfo(&list);
	for (int i = 0; i < ncolumns; i++)
	{
		bool		is_summed = columns[i].kind && columns[i].kind->function == NULL;

		if (columns[i].role == COLUMN_MEASURE && (is_summed || kept))
			append_column(&list, separator, is_summed ? summed : kept, &columns[i]);
	}
	return list.data;
}

/*
 * Write the lists that fold.h names, each here in one line or two.  A sum is
 * numeric until it is known to fit.  A condition without measures is true.
 */
static void
write_lists(Relation total)
{
	MemoryContext caller_context = MemoryContextSwitchTo(description_context);
	const char *type = first_column(COLUMN_TYPE) ? "type, " : "";
	const char *total_type = *type ? "'total', " : "";
	const char *key_size = psprintf("GREATEST(0%s)",
									list_keys(", pg_column_size(" NAME ")", ""));
	Column	   *value = find_column("value");
	const char *lists[NUM_LISTS] = {
		psprintf("%s.counted", my_schema),
		quoted_name(total->rd_id),
		psprintf("%s.stuck", my_schema),
		/* KEYS, KEYS_, MEASURES */
		list_keys(NAME, ", "),
		list_keys(NAME ", ", ""),
		list_measures(NAME, NAME, ", "),
		/* SUMS, SAME, NO_SUMS */
		list_measures("CAST(COALESCE(sum(" NAME "), 0) AS numeric) AS " NAME,
					  AGGREGATE "(" NAME ") AS " NAME, ", "),
		list_measures("max(" NAME ") AS " NAME, "max(" NAME ") AS " NAME, ", "),
		list_measures("NULL", "NULL", ", "),
		/* COLUMNS, NEW_TOTAL, FITS */
		psprintf("%s%s%s", type, list_keys(NAME ", ", ""),
				 list_measures(NAME, NAME, ", ")),
		psprintf("%s%s%s", total_type, list_keys(NAME ", ", ""),
				 list_measures("CAST(" NAME " AS " TYPE ")", NAME, ", ")),
		psprintf("(true%s)", list_measures(" AND " NAME " BETWEEN " LOWEST " AND " HIGHEST,
										   NULL, "")),
		arbiter,
		/* ADDED, ADDED_FITS */
		list_measures(NAME " = COALESCE(total." NAME ", 0) + excluded." NAME,
					  NAME " = " FUNCTION "(total." NAME ", excluded." NAME ")", ", "),
		psprintf("(true%s)", list_measures(" AND CASE"
										   " WHEN total." NAME " > 0"
										   " THEN excluded." NAME " <= " HIGHEST " - total." NAME
										   " WHEN total." NAME " < 0"
										   " THEN excluded." NAME " >= CAST(" LOWEST " AS " TYPE ") - total." NAME
										   " ELSE true END", NULL, "")),
		/* COUNT, PARTS, PART */
		!Described.has_keys && value ? "CAST(value AS bigint)" : "CAST(NULL AS bigint)",
		psprintf("GREATEST(1%s)", list_measures(", CASE"
												" WHEN " NAME " > 0"
												" THEN div(" NAME " - 1, " HIGHEST ") + 1"
												" WHEN " NAME " < 0"
												" THEN div(" NAME " + 1, " LOWEST ") + 1"
												" END", NULL, "")),
		list_measures("CAST(div(" NAME ", _n) + CASE"
					  " WHEN _i <= abs(mod(" NAME ", _n))"
					  " THEN sign(" NAME ") ELSE 0 END AS " TYPE ")", NAME, ", "),
		/* KEY_SIZE, KEY_NAME, DELTA_ */
		key_size,
		psprintf("CASE WHEN %s > 100000 THEN '(...)'"
				 " ELSE left(CAST(ROW(%s) AS text), 60) END",
				 key_size, list_keys(NAME, ", ")),
		*type ? "'delta', " : ""
	};

	memcpy(Described.lists, lists, sizeof(lists));
	Described.has_count = !Described.has_keys && value;
	Described.overflow = value ? value->type->overflow : measure_types[0].overflow;
	MemoryContextSwitchTo(caller_context);
}

/* -------------------------------------------------------------------------
 * Making what is missing
 * -------------------------------------------------------------------------
 */

/* Run the commands that make a table. */
static void
run_commands(const char *const *commands, const char *table)
{
	/* Many workers that start at once queue up to extend the catalogs. */
	table_set("lock_timeout", "10s");
	for (int i = 0; commands[i]; i++)
		table_run(psprintf(commands[i], my_schema), NULL, NULL, SPI_OK_UTILITY);
	CommandCounterIncrement();
	made[num_made++] = table;
}

/*
 * Make the schema, as ourselves, if it is missing, and counted, as the
 * schema's owner.
 */
static void
make_schema_and_counted(void)
{
	Oid			nspoid = get_namespace_oid(my_schema, true);
	Identity	before;
	HeapTuple	tuple;
	Oid			owner;

	if (!OidIsValid(nspoid))
	{
		table_run(psprintf("CREATE SCHEMA %s", my_schema), NULL, NULL, SPI_OK_UTILITY);
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

	act_as(owner, my_name, &before);
	run_commands(make_counted, "counted");
	act_as_before(&before);
}

/* Refuse a name that is taken by what is no child of counted. */
static void
check_name_free(Relation counted, const char *name)
{
	if (OidIsValid(get_relname_relid(name, RelationGetNamespace(counted))))
		ereport(ERROR,
				(errcode(ERRCODE_DUPLICATE_TABLE),
				 errmsg("relation \"%s.%s.%s\" does not inherit \"%s\"",
						my_database, my_schema, name, my_name),
				 errhint("Rename or drop it, or, if it is what its name says: ALTER TABLE %s.%s INHERIT %s.counted",
						 my_schema, name, my_schema)));
}

/*
 * Make the children of counted that are missing, as its owner, who we are by
 * now.
 */
static void
make_children(Relation counted, bool may_make)
{
	bool		no_total = !OidIsValid(Described.total);
	bool		no_stuck = !OidIsValid(Described.stuck);
	Oid			owner = counted->rd_rel->relowner;
	Column	   *other = first_column(COLUMN_OTHER);

	if (no_total)
		check_name_free(counted, "total");
	if (no_stuck)
		check_name_free(counted, "stuck");
	for (int i = 0; no_total && i < ncolumns; i++)
	{
		if (columns[i].may_be_key)
			ereport(ERROR,
					(errcode(ERRCODE_INVALID_TABLE_DEFINITION),
					 errmsg("table \"%s\" has columns that must be keys, and no totals to tell them",
							my_name),
					 errhint("CREATE TABLE %s.total (%s) INHERITS (%s.counted) WITH (fillfactor = 50)",
							 my_schema, key_constraint(NULL, InvalidOid), my_schema)));
	}
	if (no_total && other)
		refuse_other(other, NULL);

	if (!may_make)
		ereport(ERROR,
				(errcode(ERRCODE_UNDEFINED_TABLE),
				 errmsg("table \"%s.%s.%s\" does not exist", my_database, my_schema,
						no_total ? "total" : "stuck"),
				 errhint("To have it made, stop the worker and launch it again.")));
	if (!DatumGetBool(DirectFunctionCall3(has_schema_privilege_id_id,
										  ObjectIdGetDatum(owner),
										  ObjectIdGetDatum(counted->rd_rel->relnamespace),
										  CStringGetTextDatum("CREATE"))))
		ereport(ERROR,
				(errcode(ERRCODE_INSUFFICIENT_PRIVILEGE),
				 errmsg("the owner of table \"%s\" may not create tables beside it",
						my_name),
				 errhint("GRANT CREATE ON SCHEMA %s TO %s", my_schema,
						 quote_identifier(GetUserNameFromId(owner, false)))));
	if (no_total)
		run_commands(make_total, "total");
	if (no_stuck)
		run_commands(make_stuck, "stuck");
}

/* The relcache forgot something; if it was a table of ours, look at it anew. */
static void
invalidate(Datum arg, Oid relid)
{
	if (!OidIsValid(relid) || relid == Described.counted ||
		relid == Described.total || relid == Described.stuck)
		valid = false;
}

/* -------------------------------------------------------------------------
 * Acting as the owner
 * -------------------------------------------------------------------------
 */

/*
 * Act as another role, with none of our own privileges, as VACUUM does for an
 * index expression: whatever code the owner of a table has attached to it runs
 * with the owner's rights, cannot change role, and leaves no setting changed.
 * Deferred constraints would be checked at commit, when we are no longer the
 * owner; the server refuses that, so they are checked at once.
 *
 * Only a worker whose role could SET ROLE to the owner may do so: a table in
 * the right place must not lend its owner's rights to a worker, nor a worker's
 * to the owner.
 */
static void
act_as(Oid role, const char *what, Identity *before)
{
	ConstraintsSetStmt *immediate = makeNode(ConstraintsSetStmt);

	GetUserIdAndSecContext(&before->userid, &before->sec_context);
	if (!can_act_as(before->userid, role))
		ereport(ERROR,
				(errcode(ERRCODE_INSUFFICIENT_PRIVILEGE),
				 errmsg("role \"%s\" cannot act as \"%s\", who owns \"%s\"",
						GetUserNameFromId(before->userid, false),
						GetUserNameFromId(role, false), what)));
	SetUserIdAndSecContext(role,
						   before->sec_context | SECURITY_RESTRICTED_OPERATION);
	before->guc_nestlevel = NewGUCNestLevel();
	AfterTriggerSetState(immediate);
}

static void
act_as_before(const Identity *before)
{
	AtEOXact_GUC(false, before->guc_nestlevel);
	SetUserIdAndSecContext(before->userid, before->sec_context);
}
