package cli

import (
	"context"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/hallmark-id/hallmark/pkg/config"
	hallmarkv1 "github.com/hallmark-id/hallmark/proto/hallmark/v1"
)

// defaultRotateWait is how long a rotation waits for connected agents.
const defaultRotateWait = 30 * time.Second

func (a *app) authorityCommand() *cobra.Command {
	return noun("authority", "see and change the keys that sign",
		"An authority is a signing key of the trust domain. It is prepared (published, so that\n"+
			"everyone can verify what it will sign), then active (it signs), then old (what it\n"+
			"signed is still valid). The server does all that on schedule; \"rotate\" does it now.\n\n"+
			"An authority that is not to be trusted any longer, because its key may have leaked, is\n"+
			"first replaced (rotate), then tainted (everyone replaces what it signed), then revoked\n"+
			"(what it signed verifies no more).",
		"  hallmark authority list\n  hallmark authority rotate x509\n  hallmark authority taint x509 ID\n  hallmark authority revoke x509 ID",
		a.authorityList(), a.authorityShow(), a.authorityPrepare(), a.authorityActivate(), a.authorityRotate(), a.authorityTaint(), a.authorityRevoke())
}

// authorityItem is an authority as commands print it.
type authorityItem struct {
	ID          string     `json:"id"`
	Kind        string     `json:"kind"`                // x509, jwt or wit
	Algorithm   string     `json:"algorithm,omitempty"` // RS256, of a jwt one that is for relying parties which take nothing else
	State       string     `json:"state"`               // prepared, active or old
	Server      string     `json:"server"`
	CreatedAt   *time.Time `json:"created_at"`
	ActivatedAt *time.Time `json:"activated_at"`
	ExpiresAt   *time.Time `json:"expires_at"`
	Tainted     bool       `json:"tainted"`
	Use         *useItem   `json:"use,omitempty"`
}

// useItem is who depends on an authority, as far as the server knows.
type useItem struct {
	Agents          int32      `json:"agents"`           // that use an SVID which it signed
	ConnectedAgents int32      `json:"connected_agents"` // of them
	LostAgents      int32      `json:"lost_agents"`      // of them; that could not come back by themselves
	Signed          int64      `json:"signed"`           // SVIDs, since the server started
	LastExpiresAt   *time.Time `json:"last_expires_at"`  // end of the one that lasts longest
}

// authoritiesOf returns the authorities of an answer with their use.
func authoritiesOf(resp *hallmarkv1.ListAuthoritiesResponse) []authorityItem {
	items := make([]authorityItem, len(resp.GetAuthorities()))
	for i, x := range resp.GetAuthorities() {
		items[i] = authorityOf(x)
		if len(resp.Uses) == len(items) {
			u := resp.Uses[i]
			items[i].Use = &useItem{
				Agents: u.GetAgents(), ConnectedAgents: u.GetConnectedAgents(), LostAgents: u.GetLostAgents(),
				Signed: u.GetSigned(), LastExpiresAt: timestamp(u.GetLastExpiresAt()),
			}
		}
	}
	return items
}

// condition is the state with what tainting adds to it.
func (x authorityItem) condition() string {
	if x.Tainted {
		return "tainted"
	}
	return x.State
}

func authorityOf(x *hallmarkv1.Authority) authorityItem {
	kind, algorithm := strings.ToLower(strings.TrimPrefix(x.GetKind().String(), "KIND_")), ""
	if x.GetKind() == hallmarkv1.Authority_KIND_JWT_RS256 {
		kind, algorithm = "jwt", "RS256"
	}
	return authorityItem{
		ID: x.GetId(), Kind: kind, Algorithm: algorithm,
		State:  strings.ToLower(strings.TrimPrefix(x.GetState().String(), "STATE_")),
		Server: x.GetServer(), CreatedAt: timestamp(x.GetCreatedAt()), ActivatedAt: timestamp(x.GetActivatedAt()),
		ExpiresAt: timestamp(x.GetExpiresAt()), Tainted: x.GetTainted(),
	}
}

func (a *app) authorityList() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "list",
		Short: "list the authorities of all servers",
		Long: "List prints the authorities of every server of the trust domain, with their states, and\n" +
			"how many agents use an SVID that an X.509 authority signed.",
		Example: "  hallmark authority list\n  hallmark authority list -o json",
		Args:    noArguments,
	}
	socket := socketFlag(cmd, serverSocket)
	a.outputFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		return a.withAuthorities(cmd, *socket, func(ctx context.Context, c *admin) error {
			items, err := c.listAuthorities(ctx)
			if err != nil {
				return err
			}
			return a.print(items, func(w io.Writer) { io.WriteString(w, a.authorityTable(items)) })
		})
	}
	return cmd
}

func (a *app) authorityTable(items []authorityItem) string {
	t := table{style: a.style, header: []string{"KIND", "STATE", "ID", "SERVER", "EXPIRES", "AGENTS"}}
	for _, x := range items {
		agents := ""
		if x.Use != nil && x.Kind == "x509" {
			agents = thousands(int(x.Use.Agents))
		}
		t.add(text(strings.TrimSpace(x.Kind+" "+x.Algorithm)), painted(a.paintAuthority(x.condition()), x.condition()), text(x.ID), text(x.Server), text(a.momentOf(x.ExpiresAt)), text(agents))
	}
	return t.String()
}

func (a *app) paintAuthority(state string) func(string) string {
	switch state {
	case "active":
		return a.style.green
	case "prepared":
		return a.style.cyan
	case "tainted":
		return a.style.yellow
	case "revoked":
		return a.style.red
	}
	return a.style.dim
}

// withAuthorities connects a command to the server's admin socket.
func (a *app) withAuthorities(cmd *cobra.Command, socket string, do func(context.Context, *admin) error) error {
	ctx, cancel := context.WithTimeout(cmd.Context(), callTimeout)
	defer cancel()
	c, err := a.admin(ctx, socket)
	if err != nil {
		return err
	}
	defer c.Close()
	return do(ctx, c)
}

func (c *admin) listAuthorities(ctx context.Context) ([]authorityItem, error) {
	resp, err := c.server().ListAuthorities(ctx, &hallmarkv1.ListAuthoritiesRequest{})
	if err != nil {
		return nil, rpcError("list authorities", err)
	}
	return authoritiesOf(resp), nil
}

// authorityChange is the outcome of a command that changes an authority.
type authorityChange struct {
	ID        string     `json:"id"`
	Kind      string     `json:"kind"`
	State     string     `json:"state"` // that it is in now: prepared, active, tainted or revoked
	ExpiresAt *time.Time `json:"expires_at"`
}

// printChange prints what has become of an authority, and a sentence of it.
func (a *app) printChange(kind, state string, x *authorityState, sentence string) error {
	item := authorityChange{x.GetAuthorityId(), kind, state, timestamp(x.GetExpiresAt())}
	return a.print(item, func(w io.Writer) {
		fmt.Fprintf(w, "%s %s\n", a.style.bold(printable(item.ID)), sentence)
	})
}

func (a *app) authorityPrepare() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "prepare x509|jwt|wit",
		Short: "make and publish the next key",
		Long: "Prepare makes a new authority on this server and publishes it in the bundle. It signs\n" +
			"nothing until it is activated; one that is prepared already is replaced.",
		Example:   "  hallmark authority prepare x509\n  hallmark authority prepare jwt -o json",
		Args:      arguments(1, 1, "x509, jwt or wit"),
		ValidArgs: authorityKinds,
	}
	socket := socketFlag(cmd, serverSocket)
	a.outputFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		kind, err := authorityKind(args[0])
		if err != nil {
			return err
		}
		return a.withAuthorities(cmd, *socket, func(ctx context.Context, c *admin) error {
			x, err := c.authorities(kind).prepare(ctx)
			if err != nil {
				return rpcError("prepare the next "+args[0]+" authority", err)
			}
			return a.printChange(args[0], "prepared", x, "is prepared: it is in the bundle and does not sign yet.")
		})
	}
	return cmd
}

func (a *app) authorityActivate() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "activate x509|jwt|wit [ID]",
		Short: "let the prepared key sign",
		Long: "Activate lets the prepared authority of this server sign from now on; the active one\n" +
			"becomes old. It does not wait for anyone to know the new one: \"rotate\" does. It says so\n" +
			"and asks, where somebody can be asked.",
		Example:           "  hallmark authority activate x509\n  hallmark authority activate jwt 4hXr",
		Args:              arguments(1, 2, "x509, jwt or wit, and an ID"),
		ValidArgsFunction: a.completeAuthorities("prepared"),
	}
	socket := socketFlag(cmd, serverSocket)
	yes := yesFlag(cmd)
	a.outputFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		kind, err := authorityKind(args[0])
		if err != nil {
			return err
		}
		warning := fmt.Sprintf("This lets the prepared %s authority of the server sign at once; the active one becomes old.\n"+
			"Whoever does not have it in the bundle yet cannot verify what it signs; \"hallmark authority rotate %s\"\n"+
			"waits until every connected agent has it.", args[0], args[0])
		if *yes {
			a.remark("%s", warning)
		}
		if err := a.confirm(*yes, false, warning); err != nil {
			return err
		}
		return a.withAuthorities(cmd, *socket, func(ctx context.Context, c *admin) error {
			what := "activate the " + args[0] + " authority"
			calls, id := c.authorities(kind), ""
			if len(args) == 2 {
				id = args[1]
			} else {
				prepared, err := calls.prepared(ctx)
				if err != nil {
					return rpcError(what, err)
				}
				if id = prepared.GetAuthorityId(); id == "" {
					return &failure{code: exitFailed, err: fmt.Errorf("no %s authority is prepared", args[0]),
						remedy: fmt.Sprintf("\"hallmark authority prepare %s\" makes one; \"hallmark authority rotate %s\" does both.", args[0], args[0])}
				}
			}
			x, err := calls.activate(ctx, id)
			if err != nil {
				return rpcError(what, err)
			}
			return a.printChange(args[0], "active", x, "signs now.")
		})
	}
	return cmd
}

func (a *app) authorityTaint() *cobra.Command {
	return a.authorityEnd(ending{
		use: "taint", state: "tainted", from: "old",
		short: "have everyone replace what an old key signed",
		long: "Taint marks an old authority in the bundle. Agents that see the mark replace at once\n" +
			"their own SVID and those of their workloads, if it signed them, and drop tokens that it\n" +
			"signed. All of that still verifies, so nothing breaks; \"revoke\" ends that.",
		done: "is tainted: agents replace what it signed.",
		warn: a.taintWarning,
		call: func(c authorityCalls) func(context.Context, string) (*authorityState, error) {
			return c.taint
		},
	})
}

func (a *app) authorityRevoke() *cobra.Command {
	return a.authorityEnd(ending{
		use: "revoke", state: "revoked", from: "tainted",
		short: "let nothing verify that a tainted key signed",
		long: "Revoke takes a tainted authority out of the bundle and deletes its key: nothing that it\n" +
			"signed verifies any more, as soon as a verifier has the new bundle. Agents have it in\n" +
			"milliseconds; other trust domains when they next ask. It cannot be undone.",
		done: "is revoked: what it signed verifies no more.",
		warn: a.revokeWarning,
		call: func(c authorityCalls) func(context.Context, string) (*authorityState, error) {
			return c.revoke
		},
	})
}

// ending is a command that takes trust away from an authority.
type ending struct {
	use, short, long, done string
	from, state            string // what it is before and after
	warn                   func(authorityItem) []string
	call                   func(authorityCalls) func(context.Context, string) (*authorityState, error)
}

func (a *app) authorityEnd(e ending) *cobra.Command {
	cmd := &cobra.Command{
		Use:   e.use + " x509|jwt|wit|upstream ID",
		Short: e.short,
		Long: e.long + "\n\nIt says first whom this concerns, as far as the server knows, and asks. Where nobody can\n" +
			"be asked, it needs --yes.\n\n" +
			"Of kind upstream are the roots of the authority above the server's, by their key IDs\n" +
			"(\"hallmark authority show\").",
		Example:           fmt.Sprintf("  hallmark authority %s x509 5b1a9c0e8d7f6a5b4c3d2e1f0a9b8c7d6e5f4a3b\n  hallmark authority %s --yes jwt 4hXrYcUq -o json", e.use, e.use),
		Args:              arguments(2, 2, "x509, jwt, wit or upstream, and the ID that \"hallmark authority list\" shows"),
		ValidArgsFunction: a.completeAuthorities(e.from),
	}
	socket := socketFlag(cmd, serverSocket)
	yes := yesFlag(cmd)
	a.outputFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		kind, err := authorityKind(args[0])
		if err != nil && args[0] != "upstream" {
			return err
		}
		c, err := a.admin(cmd.Context(), *socket)
		if err != nil {
			return err
		}
		defer c.Close()
		if args[0] == "upstream" {
			return a.endUpstream(cmd.Context(), e, c, args[1], *yes)
		}
		what := fmt.Sprintf("%s the %s authority %s", e.use, args[0], args[1])
		ctx, cancel := context.WithTimeout(cmd.Context(), callTimeout)
		x, err := c.authority(ctx, args[0], args[1])
		cancel()
		if err == nil {
			err = e.check(x)
		}
		if err != nil {
			return err
		}
		warning := strings.Join(e.warn(x), "\n")
		if *yes {
			a.remark("%s", warning)
		}
		if err := a.confirm(*yes, true, warning); err != nil {
			return err
		}
		ctx, cancel = context.WithTimeout(cmd.Context(), callTimeout) // the user may have thought for long
		defer cancel()
		done, err := e.call(c.authorities(kind))(ctx, x.ID)
		if err != nil {
			return rpcError(what, err)
		}
		return a.printChange(args[0], e.state, done, e.done)
	}
	return cmd
}

// authority finds an authority of any server.
func (c *admin) authority(ctx context.Context, kind, id string) (authorityItem, error) {
	items, err := c.listAuthorities(ctx)
	if err != nil {
		return authorityItem{}, err
	}
	i := slices.IndexFunc(items, func(x authorityItem) bool { return x.Kind == kind && x.ID == id })
	if i < 0 {
		return authorityItem{}, &failure{code: exitNotFound, err: fmt.Errorf("there is no %s authority %s", kind, printable(id)),
			remedy: "\"hallmark authority list\" shows them."}
	}
	return items[i], nil
}

// check refuses what the server would refuse, before the user is asked.
func (e ending) check(x authorityItem) error {
	refuse := func(why, remedy string) error {
		return &failure{code: exitFailed, err: fmt.Errorf("cannot %s the %s authority %s: %s", e.use, x.Kind, x.ID, why), remedy: remedy}
	}
	switch {
	case x.State == "active":
		return refuse("it is the one that signs on server "+printable(x.Server), fmt.Sprintf("Let another one sign first: \"hallmark authority rotate %s\" there.", x.Kind))
	case x.State == "prepared":
		return refuse("it is prepared and has signed nothing", fmt.Sprintf("\"hallmark authority prepare %s\" puts another in its place.", x.Kind))
	case e.from == "tainted" && !x.Tainted:
		return refuse("it is not tainted", fmt.Sprintf("Taint it first, so that what it signed is replaced: \"hallmark authority taint %s %s\".", x.Kind, x.ID))
	}
	return nil
}

func (a *app) taintWarning(x authorityItem) []string {
	out := []string{fmt.Sprintf("This taints the %s authority %s, which expires %s.", x.Kind, x.ID, a.momentOf(x.ExpiresAt))}
	if x.Kind == "x509" {
		switch users := usersOf(x.Use); {
		case users == "":
		case x.Use.Agents == 0:
			out = append(out, "  "+users+".")
		default:
			out = append(out, "  "+users+", and replaces it at once.")
		}
		out = append(out, "  Agents replace at once the SVIDs of their workloads that it signed.")
	} else if x.Kind == "wit" {
		out = append(out, "  Agents replace at once the WIT-SVIDs of their workloads that it signed.")
	} else {
		out = append(out, "  Agents drop at once the tokens that it signed from their caches.")
	}
	return append(append(out, a.signedBy(x.Use, "")...), "What it signed goes on to verify until it is revoked.")
}

func (a *app) revokeWarning(x authorityItem) []string {
	out := []string{fmt.Sprintf("This revokes the %s authority %s: it leaves the bundle, and nothing that it signed verifies any more.", x.Kind, x.ID)}
	if users := usersOf(x.Use); users != "" && x.Kind == "x509" {
		if x.Use.Agents == 0 {
			out = append(out, "  "+users+".")
		} else {
			out = append(out, "  "+users+", and is denied from then on.")
		}
		if n := x.Use.LostAgents; n > 0 {
			out = append(out, fmt.Sprintf("  %s of these cannot attest again and must join anew (\"hallmark token generate\").", thousands(int(n))))
		}
	}
	return append(append(out, a.signedBy(x.Use, "; those not replaced yet stop working")...), "This cannot be undone.")
}

// usersOf says which agents use an SVID that an authority signed; nothing, if
// the server does not say.
func usersOf(u *useItem) string {
	switch {
	case u == nil:
		return ""
	case u.Agents == 0:
		return "No agent uses an SVID that it signed"
	case u.Agents == 1 && u.ConnectedAgents == 1:
		return "1 agent, which is connected, uses an SVID that it signed"
	case u.Agents == 1:
		return "1 agent, which is not connected, uses an SVID that it signed"
	}
	return fmt.Sprintf("Each of %s agents, %s of them connected, uses an SVID that it signed", thousands(int(u.Agents)), thousands(int(u.ConnectedAgents)))
}

// signedBy says what an authority has signed, and what becomes of it; nothing,
// if the server does not say.
func (a *app) signedBy(u *useItem, then string) []string {
	switch {
	case u == nil:
		return nil
	case u.LastExpiresAt == nil || u.LastExpiresAt.Before(a.now()):
		return []string{"  Nothing that it has signed since the server started is still valid."}
	}
	return []string{fmt.Sprintf("  It has signed %s since the server started; the last one ends %s%s.", count(int(u.Signed), "SVID", "SVIDs"), a.momentOf(u.LastExpiresAt), then)}
}

// rotationItem is the outcome of a rotation as commands print it.
type rotationItem struct {
	Activated authorityItem `json:"activated"`
	Agents    int32         `json:"agents"` // that had acknowledged it before it signed
}

func (a *app) authorityRotate() *cobra.Command {
	wait := duration{config.Duration(defaultRotateWait)}
	cmd := &cobra.Command{
		Use:   "rotate x509|jwt|wit",
		Short: "sign with a new key from now on",
		Long: "Rotate prepares a new authority, publishes it, waits until every connected agent has\n" +
			"it, and every target of publish, and lets it sign. What the old one signed stays valid.\n" +
			"If an agent does not acknowledge in time, or a target fails, the new authority stays\n" +
			"prepared and nothing else changes.",
		Example:   "  hallmark authority rotate x509\n  hallmark authority rotate jwt --wait 2m",
		Args:      arguments(1, 1, "x509, jwt or wit"),
		ValidArgs: authorityKinds,
	}
	cmd.Flags().Var(&wait, "wait", "how `long` to wait for connected agents")
	socket := socketFlag(cmd, serverSocket)
	a.outputFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		kind, err := authorityKind(args[0])
		if err != nil {
			return err
		}
		seconds, err := wait.seconds("--wait")
		if err != nil {
			return err
		}
		ctx, cancel := context.WithTimeout(cmd.Context(), time.Duration(seconds)*time.Second+callTimeout)
		defer cancel()
		c, err := a.admin(ctx, *socket)
		if err != nil {
			return err
		}
		defer c.Close()
		resp, err := c.server().RotateAuthority(ctx, &hallmarkv1.RotateAuthorityRequest{Kind: kind, Wait: seconds})
		if err != nil {
			return rpcError("rotate the "+args[0]+" authority", err)
		}
		item := rotationItem{authorityOf(resp.Activated), resp.Agents}
		return a.print(item, func(w io.Writer) {
			fmt.Fprintf(w, "%s signs now; %s had it before.\n", a.style.bold(printable(item.Activated.ID)), count(int(item.Agents), "connected agent", "connected agents"))
		})
	}
	return cmd
}

// authorityKinds are those that commands take. WIT is experimental: a server
// that does not have it says so.
var authorityKinds = []string{"x509", "jwt", "wit"}

func authorityKind(name string) (hallmarkv1.Authority_Kind, error) {
	switch name {
	case "x509":
		return hallmarkv1.Authority_KIND_X509, nil
	case "jwt":
		return hallmarkv1.Authority_KIND_JWT, nil
	case "wit":
		return hallmarkv1.Authority_KIND_WIT, nil
	}
	return 0, usageError(fmt.Errorf("%q is no kind of authority; it is x509, jwt or wit", name))
}

// completeAuthorities completes a kind of authority, then the IDs of those in a
// state.
func (a *app) completeAuthorities(state string) completer {
	return func(cmd *cobra.Command, args []string, typed string) ([]string, cobra.ShellCompDirective) {
		switch len(args) {
		case 0:
			return authorityKinds, cobra.ShellCompDirectiveNoFileComp
		case 1:
		default:
			return nil, cobra.ShellCompDirectiveNoFileComp
		}
		return a.completeFromServer(cmd, typed, func(ctx context.Context, c *admin) (all []string, err error) {
			items, err := c.listAuthorities(ctx)
			for _, x := range items {
				if x.Kind == args[0] && x.condition() == state {
					all = append(all, x.ID)
				}
			}
			return all, err
		})
	}
}
