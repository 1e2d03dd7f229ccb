/* -------------------------------------------------------------------------
 *
 * wake.c
 *		The trigger function that wakes a worker when deltas are committed.
 *
 * A worker of one's own does without this file: only counters have a table
 * that many clients write to.
 *
 * Copyright (c) 2026, worker_spi contributors
 *
 * -------------------------------------------------------------------------
 */

#include "postgres.h"

#include "access/xact.h"
#include "commands/trigger.h"
#include "fmgr.h"
#include "miscadmin.h"
#include "utils/lsyscache.h"
#include "utils/memutils.h"
#include "utils/rel.h"
#include "worker_spi.h"

/* -------------------------------------------------------------------------
 * State
 * -------------------------------------------------------------------------
 */

/* Indexes of the workers to wake at commit; lives as long as a transaction. */
static List *pending_wakes = NIL;

PG_FUNCTION_INFO_V1(worker_spi_wake);

static void wake_at_commit(XactEvent event, void *arg);
static int	index_of_table(TriggerData *trigdata);

/* -------------------------------------------------------------------------
 * The trigger
 * -------------------------------------------------------------------------
 */

/*
 * worker_spi_wake() RETURNS trigger
 *
 * For an AFTER INSERT ... FOR EACH STATEMENT trigger on schemaN.counted: have
 * worker N fold soon after the current transaction commits.  Does nothing if
 * there is no such worker then.  What a subtransaction asked for that was then
 * rolled back is forgotten too late to save a cycle that finds nothing.
 *
 * Errors: 39P01 if not called by such a trigger on such a table.
 */
Datum
worker_spi_wake(PG_FUNCTION_ARGS)
{
	static bool registered = false;
	TriggerData *trigdata = (TriggerData *) fcinfo->context;
	MemoryContext old_context;
	int			index;

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

	index = index_of_table(trigdata);
	if (!slot_have_memory())
		return PointerGetDatum(NULL);

	if (!registered)
	{
		RegisterXactCallback(wake_at_commit, NULL);
		registered = true;
	}
	old_context = MemoryContextSwitchTo(TopTransactionContext);
	pending_wakes = list_append_unique_int(pending_wakes, index);
	MemoryContextSwitchTo(old_context);
	return PointerGetDatum(NULL);
}

/* N, if the trigger's table is schemaN.counted; else an error. */
static int
index_of_table(TriggerData *trigdata)
{
	Relation	rel = trigdata->tg_relation;
	char	   *schema = get_namespace_name(RelationGetNamespace(rel));
	char		expected[NAMEDATALEN];
	int			index;

	index = schema && strncmp(schema, "schema", 6) == 0 ? atoi(schema + 6) : -1;
	snprintf(expected, sizeof(expected), "schema%d", index);
	if (index < 0 || strcmp(schema, expected) != 0 ||
		strcmp(RelationGetRelationName(rel), "counted") != 0)
		ereport(ERROR,
				(errcode(ERRCODE_E_R_I_E_TRIGGER_PROTOCOL_VIOLATED),
				 errmsg("trigger \"%s\" is on a table that no worker folds",
						trigdata->tg_trigger->tgname),
				 errhint("A worker with index N folds the table \"schemaN.counted\".")));
	return index;
}

/*
 * At the end of a transaction: at XACT_EVENT_COMMIT its rows have just become
 * visible to everybody.  A prepared transaction will be committed by somebody
 * else; its deltas wait for the next nap to end.
 */
static void
wake_at_commit(XactEvent event, void *arg)
{
	ListCell   *lc;

	if (event == XACT_EVENT_COMMIT)
		foreach(lc, pending_wakes)
			slot_wake(lfirst_int(lc), MyDatabaseId);
	if (event == XACT_EVENT_COMMIT || event == XACT_EVENT_ABORT ||
		event == XACT_EVENT_PREPARE)
		pending_wakes = NIL;	/* its memory ends with the transaction */
}
