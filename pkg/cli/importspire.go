package cli

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	bundlev1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/bundle/v1"
	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	trustdomainv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/trustdomain/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"

	"github.com/hallmark-id/hallmark/pkg/selector"
)

const maxImport = 256 << 20 // bytes of one file; about half a million entries

func (a *app) importCommand() *cobra.Command {
	return noun("import", "take over registrations from another system",
		"Import takes what another system registered into this trust domain.",
		"  hallmark import spire /tmp/spire-server/private/api.sock --dry-run",
		a.importSPIRE())
}

// registrations are what an import takes over.
type registrations struct {
	entries     []*types.Entry
	bundles     []*types.Bundle
	federations []*types.FederationRelationship
}

// The outcomes of one item of an import.
const (
	importCreated = "created"
	importThere   = "already there"
	importFailed  = "failed"
	importPlanned = "would be created"
)

type importItem struct {
	Kind    string `json:"kind"` // entry, bundle or federation
	Name    string `json:"name"` // SPIFFE ID or trust domain
	ID      string `json:"id,omitempty"`
	Outcome string `json:"outcome"`
	Reason  string `json:"reason,omitempty"`
}

func (a *app) importSPIRE() *cobra.Command {
	var rewrite, dryRun bool
	cmd := &cobra.Command{
		Use:   "spire FILE|SOCKET...",
		Short: "take over entries, bundles and federation relationships of a SPIRE server",
		Long: "Spire takes over the registration entries, the bundles of foreign trust domains and\n" +
			"the federation relationships of a SPIRE server: from its API socket, or from files\n" +
			"that these wrote (- is the standard input):\n\n" +
			"  spire-server entry show -output json\n" +
			"  spire-server bundle list -output json      # or -format spiffe\n" +
			"  spire-server federation list -output json\n\n" +
			"Entry IDs, parent IDs and all settings are kept. What is there already stays as it\n" +
			"is, so an import can be repeated. Each item that fails is named with the reason;\n" +
			"the others are taken over all the same, and the exit status is 1.",
		Example: "  hallmark import spire /tmp/spire-server/private/api.sock --dry-run\n" +
			"  hallmark import spire entries.json federations.json\n" +
			"  spire-server entry show -output json | hallmark import spire -",
		Args: arguments(1, -1, "a file or socket"),
	}
	cmd.Flags().BoolVar(&dryRun, "dry-run", false, "only say what would be done")
	cmd.Flags().BoolVar(&rewrite, "rewrite-trust-domain", false, "entries of another trust domain become entries of this one")
	socket := socketFlag(cmd, serverSocket)
	a.outputFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		ctx := cmd.Context()
		var all registrations
		for _, arg := range args {
			if err := a.readRegistrations(ctx, arg, &all); err != nil {
				return err
			}
		}
		all.separateBundles()
		c, err := a.admin(ctx, *socket)
		if err != nil {
			return err
		}
		defer c.Close()
		domainCtx, cancel := context.WithTimeout(ctx, callTimeout)
		td, err := c.domain(domainCtx)
		cancel()
		if err != nil {
			return err
		}
		if err := all.settle(td, rewrite); err != nil {
			return err
		}
		var items []importItem
		if dryRun {
			items, err = all.plan(ctx, c)
		} else {
			items = all.create(ctx, c)
		}
		if err != nil {
			return err
		}
		if err := a.print(items, func(w io.Writer) { a.showImport(w, items) }); err != nil {
			return err
		}
		for _, item := range items {
			if item.Outcome == importFailed {
				return statusError(exitFailed)
			}
		}
		return nil
	}
	return cmd
}

func (a *app) showImport(w io.Writer, items []importItem) {
	t := table{style: a.style, header: []string{"KIND", "CREATED", "ALREADY THERE", "FAILED"}}
	for _, item := range items {
		if item.Outcome == importPlanned {
			t.header[1] = "WOULD BE CREATED"
		}
		if item.Outcome == importFailed || item.Reason != "" {
			name := item.Name
			if item.ID != "" {
				name += " (" + item.ID + ")"
			}
			fmt.Fprintf(w, "%s: %s %s: %s\n", item.Outcome, item.Kind, printable(name), printable(item.Reason))
		}
	}
	for _, kind := range []string{"entry", "bundle", "federation"} {
		n := make(map[string]int)
		for _, item := range items {
			if item.Kind == kind {
				n[item.Outcome]++
			}
		}
		t.add(text(kind), text(thousands(n[importCreated]+n[importPlanned])), text(thousands(n[importThere])), text(thousands(n[importFailed])))
	}
	io.WriteString(w, t.String())
}

// readRegistrations adds what a socket or file holds.
func (a *app) readRegistrations(ctx context.Context, from string, into *registrations) error {
	path := socketPath(from)
	info, err := os.Stat(path)
	isSocket := path != from || err == nil && info.Mode()&fs.ModeSocket != 0
	if isSocket {
		if err != nil {
			return &failure{code: exitUnreachable, err: fmt.Errorf("connect to the SPIRE server: %w", err), remedy: "Name its API socket, by default /tmp/spire-server/private/api.sock."}
		}
		return into.fetch(ctx, path)
	}
	src := a.in
	if from != "-" {
		f, err := os.Open(from)
		if err != nil {
			return fmt.Errorf("read registrations: %w", err)
		}
		defer f.Close()
		src = f
	}
	data, err := io.ReadAll(io.LimitReader(src, maxImport+1))
	switch {
	case err != nil:
		return fmt.Errorf("read %s: %w", from, err)
	case len(data) > maxImport:
		return fmt.Errorf("%s is larger than %d bytes; import from the server's API socket", from, maxImport)
	}
	if err := into.parse(data); err != nil {
		return fmt.Errorf("%s: %w", from, err)
	}
	return nil
}

// fetch adds what a running server has.
func (r *registrations) fetch(ctx context.Context, path string) error {
	conn, err := dialUnix(path, nil)
	if err != nil {
		return err
	}
	c := &admin{ClientConn: conn}
	defer c.Close()
	entries, err := listEntries(ctx, c, &entryv1.ListEntriesRequest{}, 0)
	if err != nil {
		return fmt.Errorf("from the server at %s: %w", path, err)
	}
	bundles, err := listBundles(ctx, c)
	if err != nil {
		return fmt.Errorf("from the server at %s: %w", path, err)
	}
	federations, err := listFederations(ctx, c)
	if err != nil {
		return fmt.Errorf("from the server at %s: %w", path, err)
	}
	r.entries = append(r.entries, entries...)
	r.bundles = append(r.bundles, bundles...)
	r.federations = append(r.federations, federations...)
	return nil
}

var errNotSPIRE = errors.New(`this is no output of "spire-server entry show", "bundle list" or "federation list" with "-output json"`)

// parse adds what one of spire-server's commands printed. A field that is not
// known is an error, as it would be lost.
func (r *registrations) parse(data []byte) error {
	data = bytes.TrimSpace(data)
	if bytes.HasPrefix(data, []byte("*")) {
		return r.parseDocuments(data)
	}
	var keys map[string]json.RawMessage
	if err := json.Unmarshal(data, &keys); err != nil {
		return fmt.Errorf("%w: %v", errNotSPIRE, err)
	}
	var entries entryv1.ListEntriesResponse
	var bundles bundlev1.ListFederatedBundlesResponse
	var federations trustdomainv1.ListFederationRelationshipsResponse
	has := func(names ...string) bool {
		for _, name := range names {
			if _, ok := keys[name]; ok {
				return true
			}
		}
		return false
	}
	var into proto.Message
	switch {
	case has("entries"):
		into = &entries
	case has("federation_relationships", "federationRelationships"):
		into = &federations
	case has("bundles"):
		into = &bundles
	case has("keys"):
		return errors.New(`this is one bundle without the name of its trust domain; "hallmark bundle set DOMAIN FILE" takes it`)
	default:
		return errNotSPIRE
	}
	if err := protojson.Unmarshal(data, into); err != nil {
		return fmt.Errorf("%w: %v", errNotSPIRE, err)
	}
	r.entries = append(r.entries, entries.Entries...)
	r.bundles = append(r.bundles, bundles.Bundles...)
	r.federations = append(r.federations, federations.FederationRelationships...)
	return nil
}

// parseDocuments adds bundles of "bundle list -format spiffe": each is a
// document below three lines that frame the name of its trust domain.
func (r *registrations) parseDocuments(data []byte) error {
	var name string
	var document strings.Builder
	flush := func() error {
		if name == "" {
			return nil
		}
		b, err := readBundle(name, []byte(document.String()))
		if err != nil {
			return err
		}
		r.bundles = append(r.bundles, b)
		name = ""
		document.Reset()
		return nil
	}
	for line := range strings.Lines(string(data)) {
		trimmed := strings.TrimSpace(line)
		title, framed := strings.CutPrefix(trimmed, "* ")
		switch {
		case framed:
			if err := flush(); err != nil {
				return err
			}
			name = strings.TrimSpace(title)
		case trimmed != "" && strings.Trim(trimmed, "*") == "":
		default:
			document.WriteString(line)
		}
	}
	return flush()
}

// separateBundles takes the bundles out of the relationships, so that one that
// is here already is not replaced, and leaves each trust domain one.
func (r *registrations) separateBundles() {
	seen := make(map[string]bool)
	all := r.bundles
	for _, f := range r.federations {
		if f.TrustDomainBundle != nil {
			all = append(all, f.TrustDomainBundle)
			f.TrustDomainBundle = nil
		}
	}
	r.bundles = nil
	for _, b := range all {
		if !seen[b.TrustDomain] {
			seen[b.TrustDomain] = true
			r.bundles = append(r.bundles, b)
		}
	}
}

// settle makes sure that every entry is of a trust domain, or moves it there.
func (r *registrations) settle(td spiffeid.TrustDomain, rewrite bool) error {
	for _, e := range r.entries {
		from := e.GetSpiffeId().GetTrustDomain()
		if from == td.Name() || e.SpiffeId == nil || e.ParentId == nil {
			continue // the server refuses what lacks an ID
		}
		if !rewrite {
			return &failure{code: exitUsage, err: fmt.Errorf("entry %s is of trust domain %q, and this server rules %q; nothing was imported", idText(e.SpiffeId), from, td.Name()),
				remedy: "Import into a server of that trust domain, or move the entries with --rewrite-trust-domain."}
		}
		for _, id := range []*types.SPIFFEID{e.SpiffeId, e.ParentId} {
			if id.TrustDomain == from {
				id.TrustDomain = td.Name()
			}
		}
		for _, s := range e.Selectors {
			if rest, ok := strings.CutPrefix(s.Value, "spiffe://"+from+"/"); ok && s.Type == "spiffe_id" {
				s.Value = td.IDString() + "/" + rest
			}
		}
	}
	return nil
}

// sameSubject is what two entries of one subject have in common: there is one
// of them in a trust domain.
func sameSubject(a, b *types.Entry) bool {
	set := func(e *types.Entry) selector.Set {
		out := make([]selector.Selector, len(e.Selectors))
		for i, s := range e.Selectors {
			out[i] = selector.Selector{Type: s.Type, Value: s.Value}
		}
		return selector.NewSet(out...)
	}
	return idText(a.SpiffeId) == idText(b.SpiffeId) && idText(a.ParentId) == idText(b.ParentId) && set(a).Equal(set(b))
}

// compareEntry says what it means that an entry is here already.
func compareEntry(item *importItem, e, here *types.Entry) {
	switch {
	case here == nil:
		item.Outcome = importThere
	case !sameSubject(e, here):
		item.Outcome, item.Reason = importFailed, "another entry has this ID: "+idText(here.SpiffeId)
	default:
		item.Outcome = importThere
		x, y := proto.Clone(e).(*types.Entry), proto.Clone(here).(*types.Entry)
		for _, e := range []*types.Entry{x, y} {
			e.Id, e.RevisionNumber, e.CreatedAt, e.Selectors = "", 0, 0, nil
		}
		if !proto.Equal(x, y) {
			item.Reason = fmt.Sprintf("entry %s here has other settings; it stays as it is", here.Id)
		}
	}
}

func (r *registrations) items() (entries, bundles, federations []importItem) {
	for _, e := range r.entries {
		entries = append(entries, importItem{Kind: "entry", Name: idText(e.SpiffeId), ID: e.Id})
	}
	for _, b := range r.bundles {
		bundles = append(bundles, importItem{Kind: "bundle", Name: b.TrustDomain})
	}
	for _, f := range r.federations {
		federations = append(federations, importItem{Kind: "federation", Name: f.TrustDomain})
	}
	return entries, bundles, federations
}

func allItems(entries, bundles, federations []importItem) []importItem {
	return append(append(append([]importItem{}, bundles...), federations...), entries...)
}

// plan says what create would do.
func (r *registrations) plan(ctx context.Context, c *admin) ([]importItem, error) {
	here := registrations{}
	var err error
	if here.entries, err = listEntries(ctx, c, &entryv1.ListEntriesRequest{}, 0); err != nil {
		return nil, err
	}
	if here.bundles, err = listBundles(ctx, c); err != nil {
		return nil, err
	}
	if here.federations, err = listFederations(ctx, c); err != nil {
		return nil, err
	}
	byID, bySPIFFEID := make(map[string]*types.Entry), make(map[string][]*types.Entry)
	for _, e := range here.entries {
		byID[e.Id] = e
		bySPIFFEID[idText(e.SpiffeId)] = append(bySPIFFEID[idText(e.SpiffeId)], e)
	}
	names := make(map[string]bool)
	for _, b := range here.bundles {
		names["bundle "+b.TrustDomain] = true
	}
	for _, f := range here.federations {
		names["federation "+f.TrustDomain] = true
	}
	entries, bundles, federations := r.items()
	for i, e := range r.entries {
		entries[i].Outcome = importPlanned
		if x := byID[e.Id]; x != nil {
			compareEntry(&entries[i], e, x)
			continue
		}
		for _, x := range bySPIFFEID[idText(e.SpiffeId)] {
			if sameSubject(e, x) {
				compareEntry(&entries[i], e, x)
				break
			}
		}
	}
	for _, items := range [][]importItem{bundles, federations} {
		for i := range items {
			items[i].Outcome = importPlanned
			if names[items[i].Kind+" "+items[i].Name] {
				items[i].Outcome = importThere
			}
		}
	}
	return allItems(entries, bundles, federations), nil
}

// create creates all, in batches: what entries and relationships refer to
// first.
func (r *registrations) create(ctx context.Context, c *admin) []importItem {
	entries, bundles, federations := r.items()
	inBatches(ctx, bundles, func(ctx context.Context, from, to int) ([]*types.Status, error) {
		resp, err := c.bundles().BatchCreateFederatedBundle(ctx, &bundlev1.BatchCreateFederatedBundleRequest{Bundle: r.bundles[from:to], OutputMask: &types.BundleMask{}})
		return statusesOf(resp.GetResults()), rpcError("create bundles", err)
	})
	inBatches(ctx, federations, func(ctx context.Context, from, to int) ([]*types.Status, error) {
		resp, err := c.federations().BatchCreateFederationRelationship(ctx, &trustdomainv1.BatchCreateFederationRelationshipRequest{FederationRelationships: r.federations[from:to], OutputMask: &types.FederationRelationshipMask{}})
		return statusesOf(resp.GetResults()), rpcError("create federation relationships", err)
	})
	inBatches(ctx, entries, func(ctx context.Context, from, to int) ([]*types.Status, error) {
		resp, err := c.entries().BatchCreateEntry(ctx, &entryv1.BatchCreateEntryRequest{Entries: r.entries[from:to]})
		for i, result := range resp.GetResults() {
			if result.GetStatus().GetCode() == int32(codes.AlreadyExists) && from+i < to {
				compareEntry(&entries[from+i], r.entries[from+i], result.Entry)
			}
		}
		return statusesOf(resp.GetResults()), rpcError("create entries", err)
	})
	return allItems(entries, bundles, federations)
}

func statusesOf[R interface{ GetStatus() *types.Status }](results []R) []*types.Status {
	out := make([]*types.Status, len(results))
	for i, r := range results {
		out[i] = r.GetStatus()
	}
	return out
}

// inBatches makes a call for each batch of items and notes what became of
// each; an outcome that the call has noted stays.
func inBatches(ctx context.Context, items []importItem, call func(ctx context.Context, from, to int) ([]*types.Status, error)) {
	for from := 0; from < len(items); from += entryBatch {
		to := min(from+entryBatch, len(items))
		callCtx, cancel := context.WithTimeout(ctx, callTimeout)
		statuses, err := call(callCtx, from, to)
		cancel()
		for i := from; i < to; i++ {
			item := &items[i]
			switch {
			case err != nil:
				item.Outcome, item.Reason = importFailed, err.Error()
			case i-from >= len(statuses):
				item.Outcome, item.Reason = importFailed, "the server gave no result for it"
			case item.Outcome != "":
			case statuses[i-from].GetCode() == int32(codes.OK):
				item.Outcome = importCreated
			case statuses[i-from].GetCode() == int32(codes.AlreadyExists):
				item.Outcome = importThere
			default:
				item.Outcome, item.Reason = importFailed, statuses[i-from].GetMessage()
			}
		}
	}
}
