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

/* A worker that this backend has woken, or is about to. */
typedef struct Wake
{
	int			index;
	bool		pending;		/* at the end of this transaction? */
	SlotHint	hint;
} Wake;

static List *wakes = NIL;		/* of Wake; for the life of the backend */

PG_FUNCTION_INFO_V1(worker_spi_wake);

static int	index_of_table(Relation rel);
static void wake_at_commit(XactEvent event, void *arg);

/* -------------------------------------------------------------------------
 * The trigger
 * -------------------------------------------------------------------------
 */

/*
 * worker_spi_wake() RETURNS trigger
 *
 * For an AFTER INSERT ... FOR EACH STATEMENT trigger on schemaN.counted: have
 * worker N fold soon after the current transaction commits.  As it is no more
 * than a hint, it never fails a writer: as any other trigger, on any other
 * table, or without a worker, it does nothing.  What a subtransaction asked
 * for that was then rolled back is forgotten too late to save a cycle that
 * finds nothing.
 *
 * Errors: 39P01 if not called by a trigger.
 */
Datum
worker_spi_wake(PG_FUNCTION_ARGS)
{
	static bool registered = false;
	TriggerData *trigdata = (TriggerData *) fcinfo->context;
	MemoryContext caller_context;
	Wake	   *wake = NULL;
	ListCell   *lc;
	int			index;

	if (!CALLED_AS_TRIGGER(fcinfo))
		ereport(ERROR,
				(errcode(ERRCODE_E_R_I_E_TRIGGER_PROTOCOL_VIOLATED),
				 errmsg("function \"%s\" was not called by trigger manager",
						"worker_spi_wake")));

	/* A row trigger that is to fire before returns the row, or loses it. */
	if (!TRIGGER_FIRED_AFTER(trigdata->tg_event))
		return PointerGetDatum(TRIGGER_FIRED_BY_UPDATE(trigdata->tg_event) ?
							   trigdata->tg_newtuple : trigdata->tg_trigtuple);

	index = index_of_table(trigdata->tg_relation);
	if (!TRIGGER_FIRED_BY_INSERT(trigdata->tg_event) || index < 0 ||
		!slot_have_memory())
		return PointerGetDatum(NULL);

	foreach(lc, wakes)
	{
		if (((Wake *) lfirst(lc))->index == index)
			wake = lfirst(lc);
	}
	if (wake == NULL)
	{
		caller_context = MemoryContextSwitchTo(TopMemoryContext);
		wake = palloc0(sizeof(Wake));
		wake->index = index;
		wakes = lappend(wakes, wake);
		MemoryContextSwitchTo(caller_context);
	}
	if (!registered)
	{
		RegisterXactCallback(wake_at_commit, NULL);
		registered = true;
	}
	wake->pending = true;
	return PointerGetDatum(NULL);
}

/* N, if a table is schemaN.counted; else -1. */
static int
index_of_table(Relation rel)
{
	char	   *schema = get_namespace_name(RelationGetNamespace(rel));
	char		expected[NAMEDATALEN];
	int			index;

	if (schema == NULL || strncmp(schema, "schema", 6) != 0 ||
		strcmp(RelationGetRelationName(rel), "counted") != 0)
		return -1;
	index = atoi(schema + 6);
	snprintf(expected, sizeof(expected), "schema%d", index);
	return strcmp(schema, expected) == 0 ? index : -1;
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

	if (event != XACT_EVENT_COMMIT && event != XACT_EVENT_ABORT &&
		event != XACT_EVENT_PREPARE)
		return;
	foreach(lc, wakes)
	{
		Wake	   *wake = lfirst(lc);

		if (wake->pending && event == XACT_EVENT_COMMIT)
			slot_wake(wake->index, MyDatabaseId, &wake->hint);
		wake->pending = false;
	}
}
