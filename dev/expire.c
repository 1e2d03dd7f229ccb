/* -------------------------------------------------------------------------
 *
 * fold.c
 *		The job: worker N deletes the rows of schemaN.expiring that are past
 *		their date.
 *
 * -------------------------------------------------------------------------
 */

#include "postgres.h"

#include "access/table.h"
#include "executor/spi.h"
#include "miscadmin.h"
#include "nodes/makefuncs.h"
#include "pgstat.h"
#include "utils/guc.h"
#include "utils/rel.h"
#include "utils/snapmgr.h"
#include "worker_spi.h"

#define ROWS_PER_SHARE	1000	/* so that no transaction takes long */

static char schema[NAMEDATALEN];
static char table[2 * NAMEDATALEN];

/* Called once in the life of a process.  The name returned is for the log. */
const char *
fold_init(int index)
{
	snprintf(schema, sizeof(schema), "schema%d", index);
	snprintf(table, sizeof(table), "%s.expiring", schema);
	return table;
}

/*
 * Do a share of the work, in a transaction that is there already, and return
 * whether there is more.  What raises an error here is logged, and tried again
 * later; the process lives on.
 */
bool
fold_some(JobProgress *progress)
{
	const char *sql =
		psprintf("DELETE FROM ONLY %s WHERE ctid OPERATOR(pg_catalog.=) ANY"
				 " (ARRAY(SELECT ctid FROM ONLY %s WHERE expires"
				 " OPERATOR(pg_catalog.<) pg_catalog.now() LIMIT %d))",
				 table, table, ROWS_PER_SHARE);
	Relation	rel;
	Oid			userid;
	int			sec_context;
	int			nestlevel;

	/* The lock comes before the snapshot, which would else miss changes. */
	rel = table_openrv(makeRangeVar(schema, "expiring", -1), RowExclusiveLock);

	/* Triggers and the like run as the table's owner, not with our rights. */
	GetUserIdAndSecContext(&userid, &sec_context);
	if (!can_act_as(userid, rel->rd_rel->relowner))
		ereport(ERROR,
				(errcode(ERRCODE_INSUFFICIENT_PRIVILEGE),
				 errmsg("worker cannot act as the owner of \"%s\"", table)));
	SetUserIdAndSecContext(rel->rd_rel->relowner,
						   sec_context | SECURITY_RESTRICTED_OPERATION);
	nestlevel = NewGUCNestLevel();

	pgstat_report_activity(STATE_RUNNING, sql);
	PushActiveSnapshot(GetTransactionSnapshot());
	if (SPI_execute(sql, false, 0) != SPI_OK_DELETE)
		elog(ERROR, "SPI_execute failed");
	progress->rows_done = SPI_processed;
	PopActiveSnapshot();

	AtEOXact_GUC(false, nestlevel);
	SetUserIdAndSecContext(userid, sec_context);
	table_close(rel, NoLock);	/* the lock stays until the commit */
	return progress->rows_done == ROWS_PER_SHARE;
}

/*
 * Called when a cycle is over (error is NULL), and after each error.  To
 * return true is to go on with the cycle after an error.
 */
bool
fold_ended(const WorkerError *error)
{
	return false;
}
