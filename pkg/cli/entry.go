package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/spf13/cobra"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/hallmark-id/hallmark/pkg/config"
	"github.com/hallmark-id/hallmark/pkg/selector"
)

const (
	entryPage  = 1000 // entries asked for at once
	entryBatch = 500  // entries created or deleted in one call
)

func (a *app) entryCommand() *cobra.Command {
	return noun("entry", "say which process gets which identity",
		"A registration entry says who gets which SPIFFE ID: processes that match all of\n"+
			"its selectors, on nodes that its parent names.",
		"  hallmark entry list\n  hallmark entry create --spiffe-id /web --node join_token/4f1c --selector unix:user:www-data",
		a.entryCreate(), a.entryUpdate(), a.entryDelete(), a.entryShow(), a.entryList(), a.entryCount())
}

// entryFlags are the fields of an entry as flags.
type entryFlags struct {
	id, spiffeID, parentID, node, hint string
	selectors, dnsNames, federatesWith []string
	x509TTL, jwtTTL, expiresIn         duration
	expiresAt                          string
	admin, downstream, storeSVID       bool
	noPrefetch, jti                    bool
}

func (f *entryFlags) register(cmd *cobra.Command) {
	flags := cmd.Flags()
	flags.StringVar(&f.spiffeID, "spiffe-id", "", "the identity, as `SPIFFE-ID` or just /PATH")
	flags.StringVar(&f.parentID, "parent-id", "", "on which node: `SPIFFE-ID` or /PATH of an agent, a node alias or another entry")
	flags.StringVar(&f.node, "node", "", "the parent is this `AGENT`, as \"hallmark node list\" shows it")
	flags.StringArrayVar(&f.selectors, "selector", nil, "`TYPE:VALUE` that a process must have; repeat for several, all must match")
	flags.Var(&f.x509TTL, "x509-ttl", "`lifetime` of X509-SVIDs, like 1h (default the server's)")
	flags.Var(&f.jwtTTL, "jwt-ttl", "`lifetime` of JWT-SVIDs, like 5m (default the server's)")
	flags.StringArrayVar(&f.dnsNames, "dns", nil, "DNS `name` in X509-SVIDs; repeat for several")
	flags.StringArrayVar(&f.federatesWith, "federates-with", nil, "trust `domain` whose bundle the workload gets; repeat for several")
	flags.StringVar(&f.hint, "hint", "", "`text` that tells a workload its identities apart")
	flags.BoolVar(&f.admin, "admin", false, "the identity may administer the server")
	flags.BoolVar(&f.downstream, "downstream", false, "the identity may run an intermediate authority")
	flags.BoolVar(&f.storeSVID, "store-svid", false, "SVIDs go to a store, not to the Workload API")
	flags.BoolVar(&f.noPrefetch, "no-prefetch", false, "agents sign an X509-SVID only when it is asked for")
	flags.BoolVar(&f.jti, "jwt-jti", false, "each JWT-SVID has a unique jti and is not cached")
	flags.StringVar(&f.expiresAt, "expires-at", "", "`time` at which the entry ends, like 2027-01-31T00:00:00Z, or never")
	flags.Var(&f.expiresIn, "expires-in", "the same, as `time` from now, like 30d")
	exclusive(cmd, "parent-id", "node")
	exclusive(cmd, "expires-at", "expires-in")
}

// apply puts the flags that were given into an entry, and marks them in a mask.
func (f *entryFlags) apply(ctx context.Context, cmd *cobra.Command, now time.Time, c *admin, e *types.Entry) (*types.EntryMask, error) {
	mask := &types.EntryMask{}
	given := cmd.Flags().Changed
	var err error
	if given("spiffe-id") {
		if e.SpiffeId, err = c.id(ctx, "--spiffe-id", f.spiffeID); err != nil {
			return nil, err
		}
		mask.SpiffeId = true
	}
	if given("parent-id") {
		if e.ParentId, err = c.id(ctx, "--parent-id", f.parentID); err != nil {
			return nil, err
		}
		mask.ParentId = true
	}
	if given("node") {
		if e.ParentId, err = c.node(ctx, f.node); err != nil {
			return nil, err
		}
		mask.ParentId = true
	}
	if given("selector") {
		if e.Selectors, err = selectors(f.selectors); err != nil {
			return nil, err
		}
		mask.Selectors = true
	}
	if given("x509-ttl") {
		if e.X509SvidTtl, err = f.x509TTL.seconds("--x509-ttl"); err != nil {
			return nil, err
		}
		mask.X509SvidTtl = true
	}
	if given("jwt-ttl") {
		if e.JwtSvidTtl, err = f.jwtTTL.seconds("--jwt-ttl"); err != nil {
			return nil, err
		}
		mask.JwtSvidTtl = true
	}
	if given("dns") {
		e.DnsNames, mask.DnsNames = withoutEmpty(f.dnsNames), true
	}
	if given("federates-with") {
		e.FederatesWith, mask.FederatesWith = withoutEmpty(f.federatesWith), true
	}
	if given("hint") {
		e.Hint, mask.Hint = f.hint, true
	}
	if given("admin") {
		e.Admin, mask.Admin = f.admin, true
	}
	if given("downstream") {
		e.Downstream, mask.Downstream = f.downstream, true
	}
	if given("store-svid") {
		e.StoreSvid, mask.StoreSvid = f.storeSVID, true
	}
	if given("no-prefetch") || given("jwt-jti") {
		// One field of the contract holds both: what is not given stays.
		if e.AdditionalAttributes == nil {
			e.AdditionalAttributes = &types.Entry_AdditionalAttributes{}
		}
		if given("no-prefetch") {
			e.AdditionalAttributes.DisableX509SvidPrefetch = f.noPrefetch
		}
		if given("jwt-jti") {
			e.AdditionalAttributes.JwtSvidIncludeJti = f.jti
		}
		mask.AdditionalAttributes = true
	}
	if given("expires-in") {
		e.ExpiresAt, mask.ExpiresAt = now.Add(time.Duration(f.expiresIn.Duration)).Unix(), true
	}
	if given("expires-at") {
		mask.ExpiresAt = true
		if e.ExpiresAt = 0; f.expiresAt != "never" {
			t, err := time.Parse(time.RFC3339, f.expiresAt)
			if err != nil {
				return nil, usageError(fmt.Errorf("--expires-at %q is no time; write one like 2027-01-31T00:00:00Z, or never", f.expiresAt))
			}
			e.ExpiresAt = t.Unix()
		}
	}
	return mask, nil
}

// withoutEmpty lets an empty value clear a list: --dns "".
func withoutEmpty(values []string) []string {
	var out []string
	for _, v := range values {
		if v != "" {
			out = append(out, v)
		}
	}
	return out
}

func selectors(texts []string) ([]*types.Selector, error) {
	out := make([]*types.Selector, len(texts))
	for i, text := range texts {
		s, err := selector.Parse(text)
		if err != nil {
			return nil, usageError(err)
		}
		out[i] = &types.Selector{Type: s.Type, Value: s.Value}
	}
	return out, nil
}

func (a *app) entryCreate() *cobra.Command {
	var flags entryFlags
	var file string
	cmd := &cobra.Command{
		Use:   "create",
		Short: "register an identity, or many from a file",
		Long: "Create registers an identity. With --file it creates all entries of a list in YAML\n" +
			"or JSON, in the form that \"hallmark entry list -o yaml\" prints:\n\n" +
			"  - spiffe_id: /web                     # or a whole SPIFFE ID\n" +
			"    parent_id: /spire/agent/join_token/4f1c\n" +
			"    selectors: [\"unix:user:www-data\"]\n" +
			"    # also: id, x509_svid_ttl, jwt_svid_ttl, dns_names, federates_with, hint, admin,\n" +
			"    # downstream, store_svid, disable_x509_svid_prefetch, jwt_svid_include_jti, expires_at",
		Example: "  hallmark entry create --spiffe-id /web --node join_token/4f1c --selector unix:user:www-data\n" +
			"  hallmark entry create --spiffe-id /db --parent-id /dev --selector unix:uid:999 --dns db.internal --x509-ttl 10m\n" +
			"  hallmark entry list -o yaml | hallmark entry create -f -",
		Args: noArguments,
	}
	flags.register(cmd)
	cmd.Flags().StringVar(&flags.id, "id", "", "entry `ID` (default a random UUID)")
	cmd.Flags().StringVarP(&file, "file", "f", "", "`FILE` with a list of entries; - is the standard input")
	socket := socketFlag(cmd, serverSocket)
	a.outputFlag(cmd)
	for _, f := range []string{"spiffe-id", "parent-id", "node", "selector", "id"} {
		exclusive(cmd, "file", f)
	}
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		ctx, cancel := context.WithTimeout(cmd.Context(), callTimeout)
		defer cancel()
		if file != "" {
			return a.createFromFile(cmd.Context(), *socket, file)
		}
		if err := required(cmd, "spiffe-id", "selector"); err != nil {
			return err
		}
		if !cmd.Flags().Changed("parent-id") && !cmd.Flags().Changed("node") {
			return &failure{code: exitUsage, err: fmt.Errorf("%q needs --parent-id or --node: on which node", cmd.CommandPath()),
				remedy: `"hallmark node list" shows the nodes.`}
		}
		c, err := a.admin(ctx, *socket)
		if err != nil {
			return err
		}
		defer c.Close()
		e := &types.Entry{Id: flags.id}
		if _, err := flags.apply(ctx, cmd, a.now(), c, e); err != nil {
			return err
		}
		created, errs := a.createEntries(ctx, c, []*types.Entry{e})
		if len(errs) > 0 {
			return joined(errs)
		}
		return a.print(entryOf(created[0]), func(w io.Writer) { a.showEntry(w, created[0]) })
	}
	return cmd
}

// createEntries creates entries in batches; it returns those that were and the
// reasons of those that were not.
func (a *app) createEntries(ctx context.Context, c *admin, entries []*types.Entry) (created []*types.Entry, errs []error) {
	for len(entries) > 0 {
		n := min(entryBatch, len(entries))
		batch := entries[:n]
		entries = entries[n:]
		callCtx, cancel := context.WithTimeout(ctx, callTimeout)
		resp, err := c.entries().BatchCreateEntry(callCtx, &entryv1.BatchCreateEntryRequest{Entries: batch})
		cancel()
		if err != nil {
			return created, append(errs, rpcError("create entries", err))
		}
		for i, r := range resp.Results {
			code := codes.Code(r.GetStatus().GetCode())
			what := "create an entry"
			if i < len(batch) {
				what += " for " + idText(batch[i].SpiffeId)
			}
			switch {
			case code == codes.OK:
				created = append(created, r.Entry)
			case code == codes.AlreadyExists && r.Entry != nil:
				errs = append(errs, itemError(what, r.Status.Code, fmt.Sprintf("%s: %s", r.Status.Message, r.Entry.Id)))
			default:
				errs = append(errs, itemError(what, r.GetStatus().GetCode(), r.GetStatus().GetMessage()))
			}
		}
	}
	return created, errs
}

func (a *app) createFromFile(ctx context.Context, socket, file string) error {
	src := config.Source{Name: "standard input"}
	var err error
	if file == "-" {
		src.Data, err = io.ReadAll(io.LimitReader(a.in, config.MaxSize+1))
	} else {
		src, err = config.ReadFile(file)
	}
	if err != nil {
		return err
	}
	var items []entryItem
	if err := config.Decode(src, &items); err != nil {
		return err
	}
	if len(items) == 0 {
		return fmt.Errorf("%s holds no entries", src.Name)
	}
	c, err := a.admin(ctx, socket)
	if err != nil {
		return err
	}
	defer c.Close()
	entries := make([]*types.Entry, len(items))
	for i := range items {
		if entries[i], err = items[i].entry(ctx, c); err != nil {
			return src.Errorf(fmt.Sprint(i), "%v", err)
		}
	}
	created, errs := a.createEntries(ctx, c, entries)
	if err := a.printEntries(created); err != nil {
		return err
	}
	if a.output == outputTable {
		a.remark("%s created, %d failed", count(len(created), "entry", "entries"), len(errs))
	}
	return joined(errs)
}

func (a *app) entryUpdate() *cobra.Command {
	var flags entryFlags
	cmd := &cobra.Command{
		Use:   "update ENTRY_ID",
		Short: "change the fields that are given",
		Long: "Update changes the fields whose flags are given and leaves the others. A list that\n" +
			"is given replaces the old one; an empty value clears it: --dns \"\".",
		Example: "  hallmark entry update 0b2f6f0c-7a0e-4c58-8d3d-0f7c1d6f5a41 --x509-ttl 10m\n" +
			"  hallmark entry update web --selector unix:user:www-data --selector unix:path:/usr/sbin/nginx",
		Args:              arguments(1, 1, "an entry ID"),
		ValidArgsFunction: a.completeEntries(1),
	}
	flags.register(cmd)
	socket := socketFlag(cmd, serverSocket)
	a.outputFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		ctx, cancel := context.WithTimeout(cmd.Context(), callTimeout)
		defer cancel()
		c, err := a.admin(ctx, *socket)
		if err != nil {
			return err
		}
		defer c.Close()
		e := &types.Entry{Id: args[0]}
		if cmd.Flags().Changed("no-prefetch") != cmd.Flags().Changed("jwt-jti") {
			old, err := c.entries().GetEntry(ctx, &entryv1.GetEntryRequest{Id: args[0]})
			if err != nil {
				return rpcError("update entry "+args[0], err)
			}
			e.AdditionalAttributes = old.AdditionalAttributes
		}
		mask, err := flags.apply(ctx, cmd, a.now(), c, e)
		if err != nil {
			return err
		}
		if mask.String() == "" {
			return usageError(errors.New("nothing to change: give the flags of the fields that are new"))
		}
		resp, err := c.entries().BatchUpdateEntry(ctx, &entryv1.BatchUpdateEntryRequest{Entries: []*types.Entry{e}, InputMask: mask})
		if err != nil {
			return rpcError("update entry "+args[0], err)
		}
		if len(resp.Results) != 1 {
			return fmt.Errorf("update entry %s: the server gave %d results for one entry", args[0], len(resp.Results))
		}
		r := resp.Results[0]
		if r.GetStatus().GetCode() != int32(codes.OK) {
			return itemError("update entry "+args[0], r.GetStatus().GetCode(), r.GetStatus().GetMessage())
		}
		return a.print(entryOf(r.Entry), func(w io.Writer) { a.showEntry(w, r.Entry) })
	}
	return cmd
}

func (a *app) entryDelete() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "delete ENTRY_ID...",
		Short: "delete entries; their SVIDs are withdrawn from the agents",
		Long: "Delete removes registration entries. Agents drop the identities at once and close\n" +
			"the streams that carried them; SVIDs that a process still holds stay valid until\n" +
			"they expire.",
		Example:           "  hallmark entry delete 0b2f6f0c-7a0e-4c58-8d3d-0f7c1d6f5a41",
		Args:              arguments(1, -1, "an entry ID"),
		ValidArgsFunction: a.completeEntries(-1),
	}
	socket := socketFlag(cmd, serverSocket)
	yes := yesFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		c, err := a.admin(cmd.Context(), *socket)
		if err != nil {
			return err
		}
		defer c.Close()
		if len(args) > 1 {
			if err := a.confirm(*yes, false, fmt.Sprintf("This deletes %d entries: processes that match them lose their identities.", len(args))); err != nil {
				return err
			}
		}
		return a.deleteEntries(cmd.Context(), c, args)
	}
	return cmd
}

func (a *app) deleteEntries(ctx context.Context, c *admin, ids []string) error {
	var errs []error
	for len(ids) > 0 {
		n := min(entryBatch, len(ids))
		batch := ids[:n]
		ids = ids[n:]
		callCtx, cancel := context.WithTimeout(ctx, callTimeout)
		resp, err := c.entries().BatchDeleteEntry(callCtx, &entryv1.BatchDeleteEntryRequest{Ids: batch})
		cancel()
		if err != nil {
			return joined(append(errs, rpcError("delete entries", err)))
		}
		for _, r := range resp.Results {
			if r.GetStatus().GetCode() != int32(codes.OK) {
				errs = append(errs, itemError("delete entry "+r.Id, r.GetStatus().GetCode(), r.GetStatus().GetMessage()))
				continue
			}
			fmt.Fprintf(a.out, "deleted %s\n", printable(r.Id))
		}
	}
	return joined(errs)
}

func (a *app) entryShow() *cobra.Command {
	cmd := &cobra.Command{
		Use:               "show ENTRY_ID...",
		Short:             "show entries whole",
		Long:              "Show prints every field of one or several entries.",
		Example:           "  hallmark entry show 0b2f6f0c-7a0e-4c58-8d3d-0f7c1d6f5a41\n  hallmark entry show web -o yaml",
		Args:              arguments(1, -1, "an entry ID"),
		ValidArgsFunction: a.completeEntries(-1),
	}
	socket := socketFlag(cmd, serverSocket)
	a.outputFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		ctx, cancel := context.WithTimeout(cmd.Context(), callTimeout)
		defer cancel()
		c, err := a.admin(ctx, *socket)
		if err != nil {
			return err
		}
		defer c.Close()
		var found []*types.Entry
		var errs []error
		for _, id := range args {
			e, err := c.entries().GetEntry(ctx, &entryv1.GetEntryRequest{Id: id})
			if err != nil {
				errs = append(errs, rpcError("show entry "+id, err))
				continue
			}
			found = append(found, e)
		}
		var data any
		switch {
		case len(found) == 0:
			return joined(errs)
		case len(args) == 1:
			data = entryOf(found[0])
		default:
			data = entriesOf(found)
		}
		if err := a.print(data, func(w io.Writer) {
			for i, e := range found {
				if i > 0 {
					fmt.Fprintln(w)
				}
				a.showEntry(w, e)
			}
		}); err != nil {
			return err
		}
		return joined(errs)
	}
	return cmd
}

// entryFilter is the flags that choose entries.
type entryFilter struct {
	spiffeID, parentID, node, hint string
	selectors, federatesWith       []string
	downstream                     bool
}

func (f *entryFilter) register(cmd *cobra.Command) {
	flags := cmd.Flags()
	flags.StringVar(&f.spiffeID, "spiffe-id", "", "only of this identity, `SPIFFE-ID` or /PATH")
	flags.StringVar(&f.parentID, "parent-id", "", "only with this parent, `SPIFFE-ID` or /PATH")
	flags.StringVar(&f.node, "node", "", "only with this `AGENT` as parent")
	flags.StringArrayVar(&f.selectors, "selector", nil, "only with this `TYPE:VALUE`; repeat for several, an entry has all of them")
	flags.StringArrayVar(&f.federatesWith, "federates-with", nil, "only those that federate with this trust `domain`; repeat for several")
	flags.StringVar(&f.hint, "hint", "", "only with this hint `text`")
	flags.BoolVar(&f.downstream, "downstream", false, "only downstream ones; =false for only the others")
	exclusive(cmd, "parent-id", "node")
}

func (f *entryFilter) filter(ctx context.Context, cmd *cobra.Command, c *admin) (*entryv1.ListEntriesRequest_Filter, error) {
	out := &entryv1.ListEntriesRequest_Filter{}
	given := cmd.Flags().Changed
	var err error
	if given("spiffe-id") {
		if out.BySpiffeId, err = c.id(ctx, "--spiffe-id", f.spiffeID); err != nil {
			return nil, err
		}
	}
	if given("parent-id") {
		if out.ByParentId, err = c.id(ctx, "--parent-id", f.parentID); err != nil {
			return nil, err
		}
	}
	if given("node") {
		if out.ByParentId, err = c.node(ctx, f.node); err != nil {
			return nil, err
		}
	}
	if given("selector") {
		s, err := selectors(f.selectors)
		if err != nil {
			return nil, err
		}
		out.BySelectors = &types.SelectorMatch{Selectors: s, Match: types.SelectorMatch_MATCH_SUPERSET}
	}
	if given("federates-with") {
		for _, name := range f.federatesWith {
			if _, err := spiffeid.TrustDomainFromString(name); err != nil {
				return nil, usageError(fmt.Errorf("--federates-with %q: %w", name, err))
			}
		}
		out.ByFederatesWith = &types.FederatesWithMatch{TrustDomains: f.federatesWith, Match: types.FederatesWithMatch_MATCH_SUPERSET}
	}
	if given("hint") {
		out.ByHint = wrapperspb.String(f.hint)
	}
	if given("downstream") {
		out.ByDownstream = wrapperspb.Bool(f.downstream)
	}
	return out, nil
}

func (a *app) entryList() *cobra.Command {
	var filter entryFilter
	var limit int
	cmd := &cobra.Command{
		Use:   "list",
		Short: "list entries",
		Long: "List prints the registration entries that all of the given flags choose, by entry\n" +
			"ID. What -o json and yaml print, \"hallmark entry create -f\" reads.",
		Example: "  hallmark entry list\n  hallmark entry list --parent-id /dev --selector unix:uid:1000\n  hallmark entry list -o json | jq -r '.[].spiffe_id'",
		Args:    noArguments,
	}
	filter.register(cmd)
	cmd.Flags().IntVar(&limit, "limit", 0, "the most `entries` to list (default all)")
	socket := socketFlag(cmd, serverSocket)
	a.outputFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		c, err := a.admin(cmd.Context(), *socket)
		if err != nil {
			return err
		}
		defer c.Close()
		chosen, err := filter.filter(cmd.Context(), cmd, c)
		if err != nil {
			return err
		}
		entries, err := listEntries(cmd.Context(), c, &entryv1.ListEntriesRequest{Filter: chosen}, limit)
		if err != nil {
			return err
		}
		if len(entries) == 0 && a.output == outputTable {
			a.remark("No entries.")
			return nil
		}
		return a.printEntries(entries)
	}
	return cmd
}

// listEntries asks for page after page. A limit of 0 is none.
func listEntries(ctx context.Context, c *admin, req *entryv1.ListEntriesRequest, limit int) ([]*types.Entry, error) {
	var out []*types.Entry
	for {
		req.PageSize = entryPage
		if limit > 0 {
			req.PageSize = int32(min(entryPage, limit-len(out)))
		}
		callCtx, cancel := context.WithTimeout(ctx, callTimeout)
		resp, err := c.entries().ListEntries(callCtx, req)
		cancel()
		if err != nil {
			return nil, rpcError("list entries", err)
		}
		out = append(out, resp.Entries...)
		if resp.NextPageToken == "" || limit > 0 && len(out) >= limit {
			return out, nil
		}
		req.PageToken = resp.NextPageToken
	}
}

func (a *app) entryCount() *cobra.Command {
	var filter entryFilter
	cmd := &cobra.Command{
		Use:     "count",
		Short:   "count entries",
		Long:    "Count prints how many entries all of the given flags choose.",
		Example: "  hallmark entry count\n  hallmark entry count --node join_token/4f1c",
		Args:    noArguments,
	}
	filter.register(cmd)
	socket := socketFlag(cmd, serverSocket)
	a.outputFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		ctx, cancel := context.WithTimeout(cmd.Context(), callTimeout)
		defer cancel()
		c, err := a.admin(ctx, *socket)
		if err != nil {
			return err
		}
		defer c.Close()
		f, err := filter.filter(ctx, cmd, c)
		if err != nil {
			return err
		}
		resp, err := c.entries().CountEntries(ctx, &entryv1.CountEntriesRequest{Filter: &entryv1.CountEntriesRequest_Filter{
			BySpiffeId: f.BySpiffeId, ByParentId: f.ByParentId, BySelectors: f.BySelectors,
			ByFederatesWith: f.ByFederatesWith, ByHint: f.ByHint, ByDownstream: f.ByDownstream,
		}})
		if err != nil {
			return rpcError("count entries", err)
		}
		return a.print(struct {
			Count int32 `json:"count"`
		}{resp.Count}, func(w io.Writer) { fmt.Fprintln(w, resp.Count) })
	}
	return cmd
}

// completeEntries completes entry IDs, at most most of them; negative is no
// bound.
func (a *app) completeEntries(most int) completer {
	return func(cmd *cobra.Command, args []string, typed string) ([]string, cobra.ShellCompDirective) {
		if most >= 0 && len(args) >= most {
			return nil, cobra.ShellCompDirectiveNoFileComp
		}
		return a.completeFromServer(cmd, typed, func(ctx context.Context, c *admin) (all []string, err error) {
			resp, err := c.entries().ListEntries(ctx, &entryv1.ListEntriesRequest{OutputMask: &types.EntryMask{SpiffeId: true}, PageSize: completionItems})
			for _, e := range resp.GetEntries() {
				all = append(all, e.Id+"\t"+idText(e.SpiffeId))
			}
			return all, err
		})
	}
}

// fileFor completes a flag with file names.
func fileFor(cmd *cobra.Command, flag string, extensions ...string) {
	_ = cmd.MarkFlagFilename(flag, extensions...) // fails only for a flag that does not exist
}
