package cli

import (
	"cmp"
	"context"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os/exec"
	"slices"
	"time"

	"github.com/spf13/cobra"
	"github.com/spiffe/go-spiffe/v2/bundle/jwtbundle"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/exp/bundle/witbundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

func (a *app) fetchCommand() *cobra.Command {
	return noun("fetch", "fetch this process's identities over the Workload API",
		"Fetch asks the Workload API as any process would: the agent looks at who is asking\n"+
			"and answers with the identities that are registered for that process.",
		"  hallmark fetch x509\n  hallmark fetch jwt --audience api.internal\n  hallmark fetch x509 --write /run/identity --watch",
		a.fetchX509(), a.fetchJWT(), a.fetchWIT(), a.fetchBundle())
}

// fetching is what the fetch commands have in common.
type fetching struct {
	socket   *string
	dir      string
	watch    bool
	onChange string
}

func (f *fetching) register(cmd *cobra.Command, watch string) {
	f.socket = socketFlag(cmd, workloadSocket)
	cmd.Flags().StringVar(&f.dir, "write", "", "`DIR` to write files to, each atomically")
	cmd.Flags().BoolVar(&f.watch, "watch", false, watch)
	cmd.Flags().StringVar(&f.onChange, "on-change", "", "with --write and --watch, `COMMAND` for the shell to run each time the files were written")
	_ = cmd.MarkFlagDirname("write") // fails only for a flag that does not exist
}

// check says whether the flags go together.
func (f *fetching) check() error {
	if f.onChange != "" && (f.dir == "" || !f.watch) {
		return usageError(errors.New("--on-change goes with --write and --watch"))
	}
	return nil
}

// onChangeTime is how long a command of --on-change may run. Meanwhile nothing
// newer is written.
const onChangeTime = time.Minute

// changed runs what is to be run once files were written. That it fails is told,
// and changes nothing: the files are good, and there will be newer ones.
func (a *app) changed(ctx context.Context, f *fetching) {
	if f.onChange == "" {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, onChangeTime)
	defer cancel()
	cmd := exec.CommandContext(ctx, "/bin/sh", "-c", f.onChange)
	cmd.Stdout, cmd.Stderr = a.err, a.err // standard output is for what was fetched
	cmd.WaitDelay = time.Second           // its children may hold the output open
	switch err := cmd.Run(); {
	case ctx.Err() == context.DeadlineExceeded:
		a.remark("--on-change: the command had not ended after %s and was killed; have it start what lasts longer in the background", onChangeTime)
	case ctx.Err() == nil && err != nil && !errors.Is(err, exec.ErrWaitDelay):
		a.remark("--on-change: the command failed: %v", err)
	}
}

// withdraw removes what an earlier answer was written as, if an error says that
// this process may not have it any more: then it is to stop using it (Workload
// API §5.2.1).
func (a *app) withdraw(dir string, err error, remove func(dir string) error) {
	if dir == "" || status.Code(err) != codes.PermissionDenied {
		return
	}
	if err := remove(dir); err != nil {
		a.remark("%v", err)
	}
}

func removeX509(dir string) error    { return removeFrom(dir, 0, x509Files) }
func removeJWT(dir string) error     { return removeFrom(dir, 0, jwtFiles) }
func removeWIT(dir string) error     { return removeFrom(dir, 0, witFiles) }
func removeBundles(dir string) error { return writeBundles(dir, nil) }

// workloadError puts the Workload API's refusals into words.
func workloadError(what string, err error) error {
	if status.Code(err) == codes.PermissionDenied {
		return &failure{code: exitDenied, err: fmt.Errorf("%s: this process has no identity", what),
			remedy: `"hallmark explain" says which entries it misses, and why.`}
	}
	return rpcError(what, err)
}

// nothing is what a Workload API client of go-spiffe does between attempts of
// a stream that broke.
type retryAfter time.Duration

func (r retryAfter) NewBackoff() workloadapi.Backoff { return r }
func (r retryAfter) Next() time.Duration             { return time.Duration(r) }
func (r retryAfter) Reset()                          {}

// watchRetry is how soon --watch asks again after a stream ended.
const watchRetry = retryAfter(time.Second)

// document prints one of several outputs that follow each other: JSON as one
// line each, YAML as documents, tables with an empty line between.
func (a *app) document(first bool, data any, forPeople func(w io.Writer)) error {
	switch a.output {
	case outputJSON:
		return json.NewEncoder(a.out).Encode(data)
	case outputYAML:
		if !first {
			fmt.Fprintln(a.out, "---")
		}
	default:
		if !first {
			fmt.Fprintln(a.out)
		}
	}
	return a.print(data, forPeople)
}

func (a *app) fetchX509() *cobra.Command {
	var f fetching
	var from exchanging
	var id string
	cmd := &cobra.Command{
		Use:   "x509",
		Short: "fetch X509-SVIDs",
		Long: "Fetch prints the X509-SVIDs of this process. With --write it also writes each as\n" +
			"svid.N.pem (chain), svid.N.key (private key, for this user only) and bundle.N.pem\n" +
			"(authorities); with --watch it keeps them current until it is interrupted, and with\n" +
			"--on-change it then has whoever reads the files read them again.",
		Example: "  hallmark fetch x509\n  hallmark fetch x509 -o json | jq -r .[0].spiffe_id\n  hallmark fetch x509 --write /run/identity --watch\n" +
			"  hallmark fetch x509 --write /run/identity --watch --on-change ./reload.sh\n" +
			"  hallmark fetch x509 --from-token job.token --token-endpoint https://tokens.example.org --write identity",
		Args: noArguments,
	}
	f.register(cmd, "go on, and print (and write) again at each change")
	from.register(cmd)
	cmd.Flags().StringVar(&id, "spiffe-id", "", "with --from-token, the `SPIFFE-ID` that is wanted if several match")
	a.outputFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		ctx := cmd.Context()
		if err := cmp.Or(f.check(), from.check(f.watch)); err != nil {
			return err
		}
		if from.token != "" {
			x, err := a.exchangeX509(ctx, &from, id)
			if err != nil {
				return err
			}
			return a.deliverX509(x, f.dir, true, false)
		}
		if id != "" {
			return usageError(errors.New("--spiffe-id goes with --from-token"))
		}
		client, err := workload(ctx, *f.socket, workloadapi.WithBackoffStrategy(watchRetry))
		if err != nil {
			return err
		}
		defer client.Close()
		if !f.watch {
			ctx, cancel := context.WithTimeout(ctx, callTimeout)
			defer cancel()
			x, err := client.FetchX509Context(ctx)
			if err != nil {
				a.withdraw(f.dir, err, removeX509)
				return workloadError("fetch X509-SVIDs", err)
			}
			return a.deliverX509(x, f.dir, true, false)
		}
		w := &x509Watcher{app: a, fetching: &f, ctx: ctx, first: true}
		return w.end(client.WatchX509Context(ctx, w))
	}
	return cmd
}

// deliverX509 prints and writes what one answer of the Workload API holds.
func (a *app) deliverX509(x *workloadapi.X509Context, dir string, first, several bool) error {
	roots := make([][]*x509.Certificate, len(x.SVIDs))
	items := make([]*x509Item, len(x.SVIDs))
	for i, s := range x.SVIDs {
		bundle, err := x.Bundles.GetX509BundleForTrustDomain(s.ID.TrustDomain())
		if err != nil {
			return fmt.Errorf("the answer has no bundle for %s", s.ID)
		}
		roots[i] = bundle.X509Authorities()
		if items[i], err = x509Of(s, roots[i]); err != nil {
			return err
		}
	}
	if dir != "" {
		if err := writeX509(dir, x.SVIDs, roots); err != nil {
			return err
		}
	}
	show := func(w io.Writer) {
		for i, s := range x.SVIDs {
			if i > 0 {
				fmt.Fprintln(w)
			}
			a.showX509(w, s, roots[i])
		}
	}
	var err error
	if several {
		err = a.document(first, items, show)
	} else {
		err = a.print(items, show)
	}
	if err == nil && dir != "" && a.output == outputTable {
		a.remark("%s written to %s.", count(len(items), "SVID", "SVIDs"), dir)
	}
	return err
}

// x509Watcher delivers each update of a watch. One goroutine calls it.
type x509Watcher struct {
	app      *app
	ctx      context.Context
	fetching *fetching
	first    bool
	said     string // the last error that was told
}

func (w *x509Watcher) OnX509ContextUpdate(x *workloadapi.X509Context) {
	err := w.app.deliverX509(x, w.fetching.dir, w.first, true)
	w.first, w.said = false, ""
	if err != nil {
		w.app.remark("%v", err) // the next update may be delivered
		return
	}
	w.app.changed(w.ctx, w.fetching)
}

func (w *x509Watcher) OnX509ContextWatchError(err error) {
	w.app.withdraw(w.fetching.dir, err, removeX509)
	w.said = w.app.watchTrouble(w.ctx, "fetch X509-SVIDs", err, w.said)
}

// end turns a watch's end into a command's: an interrupt is no failure.
func (w *x509Watcher) end(err error) error { return watchEnd(w.ctx, "fetch X509-SVIDs", err) }

func watchEnd(ctx context.Context, what string, err error) error {
	if ctx.Err() != nil {
		return nil
	}
	return workloadError(what, err)
}

// watchTrouble tells what interrupts a watch, once for each reason. It returns
// the reason.
func (a *app) watchTrouble(ctx context.Context, what string, err error, said string) string {
	if ctx.Err() != nil || err == nil || errors.Is(err, io.EOF) {
		return said
	}
	reason := workloadError(what, err).Error()
	if reason != said {
		fmt.Fprintf(a.err, "%s %s; trying again\n", a.errStyle.yellow("hallmark:"), reason)
	}
	return reason
}

func (a *app) fetchJWT() *cobra.Command {
	var f fetching
	var from exchanging
	var audience []string
	var id string
	cmd := &cobra.Command{
		Use:   "jwt",
		Short: "fetch JWT-SVIDs",
		Long: "Fetch prints a JWT-SVID for each identity of this process, one token a line. With\n" +
			"--write it also writes each as svid.N.jwt, for this user only; with --watch it does\n" +
			"so again when half of their lifetime is over. Files of identities that were taken\n" +
			"away are removed.",
		Example: "  hallmark fetch jwt --audience api.internal\n" +
			"  curl -H \"Authorization: Bearer $(hallmark fetch jwt --audience api.internal)\" https://api.internal\n" +
			"  hallmark fetch jwt --audience api.internal -o json",
		Args: noArguments,
	}
	cmd.Flags().StringArrayVar(&audience, "audience", nil, "`name` of whom the token is for; repeat for several")
	cmd.Flags().StringVar(&id, "spiffe-id", "", "only for this `SPIFFE-ID` of the identities")
	f.register(cmd, "go on, and print (and write) new tokens in time")
	from.register(cmd)
	a.outputFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		if err := required(cmd, "audience"); err != nil {
			return err
		}
		params := jwtsvid.Params{Audience: audience[0], ExtraAudiences: audience[1:]}
		if id != "" {
			subject, err := spiffeid.FromString(id)
			if err != nil {
				return usageError(fmt.Errorf("--spiffe-id %q: %w", id, err))
			}
			params.Subject = subject
		}
		ctx := cmd.Context()
		if err := cmp.Or(f.check(), from.check(f.watch)); err != nil {
			return err
		}
		if from.token != "" {
			svid, err := a.exchangeJWT(ctx, &from, id, audience)
			if err != nil {
				return err
			}
			return a.deliverJWT([]*jwtsvid.SVID{svid}, f.dir, true, false)
		}
		client, err := workload(ctx, *f.socket)
		if err != nil {
			return err
		}
		defer client.Close()
		return a.followJWT(ctx, client, params, f.watch,
			func(svids []*jwtsvid.SVID, first bool) error {
				if err := a.deliverJWT(svids, f.dir, first, f.watch); err != nil {
					return err
				}
				a.changed(ctx, &f)
				return nil
			},
			func(err error) { a.withdraw(f.dir, err, removeJWT) })
	}
	return cmd
}

// followJWT fetches JWT-SVIDs and delivers them, once, or again and again at half
// of their lifetime. It tells failed of each failure.
func (a *app) followJWT(ctx context.Context, client *workloadapi.Client, params jwtsvid.Params, watch bool, deliver func(svids []*jwtsvid.SVID, first bool) error, failed func(error)) error {
	said := ""
	for first := true; ; {
		callCtx, cancel := context.WithTimeout(ctx, callTimeout)
		svids, err := client.FetchJWTSVIDs(callCtx, params)
		cancel()
		if err != nil {
			failed(err)
		}
		wait := time.Duration(watchRetry)
		switch {
		case err != nil && !watch:
			return workloadError("fetch JWT-SVIDs", err)
		case err != nil:
			said = a.watchTrouble(ctx, "fetch JWT-SVIDs", err, said)
		default:
			if err := deliver(svids, first); err != nil {
				return err
			}
			if !watch {
				return nil
			}
			first, said = false, ""
			ends := slices.MinFunc(svids, func(x, y *jwtsvid.SVID) int { return x.Expiry.Compare(y.Expiry) }).Expiry
			wait = max(wait, ends.Sub(a.now())/2)
		}
		timer := time.NewTimer(wait)
		select {
		case <-timer.C:
		case <-ctx.Done():
			timer.Stop()
			return nil
		}
	}
}

func (a *app) deliverJWT(svids []*jwtsvid.SVID, dir string, first, several bool) error {
	items := make([]jwtItem, len(svids))
	for i, s := range svids {
		items[i] = jwtOf(s)
	}
	if dir != "" {
		if err := writeJWT(dir, items); err != nil {
			return err
		}
	}
	show := func(w io.Writer) {
		for _, item := range items {
			fmt.Fprintln(w, item.Token)
		}
	}
	if several && a.output != outputTable {
		return a.document(first, items, show)
	}
	if err := a.print(items, show); err != nil {
		return err
	}
	if a.output == outputTable {
		for _, item := range items {
			a.remark("%s, until %s", item.SPIFFEID, a.moment(*item.ExpiresAt))
		}
	}
	return nil
}

func (a *app) fetchBundle() *cobra.Command {
	var f fetching
	cmd := &cobra.Command{
		Use:   "bundle",
		Short: "fetch the bundles that verify others",
		Long: "Fetch prints the bundles of this process's trust domain and of those it federates\n" +
			"with. With --write it also writes each as DOMAIN.pem (X.509), DOMAIN.jwks.json (JWT)\n" +
			"and, where the agent offers it, DOMAIN.wit.jwks.json (WIT), and removes those of\n" +
			"domains that are gone; with --watch it keeps them current until it is interrupted.",
		Example: "  hallmark fetch bundle\n  hallmark fetch bundle --write /run/bundles --watch",
		Args:    noArguments,
	}
	f.register(cmd, "go on, and print (and write) again at each change")
	a.outputFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		if err := f.check(); err != nil {
			return err
		}
		client, err := workload(cmd.Context(), *f.socket, workloadapi.WithBackoffStrategy(watchRetry))
		if err != nil {
			return err
		}
		defer client.Close()
		if f.watch {
			return a.watchBundles(cmd.Context(), client, &f)
		}
		ctx, cancel := context.WithTimeout(cmd.Context(), callTimeout)
		defer cancel()
		x, err := client.FetchX509Bundles(ctx)
		if err != nil {
			a.withdraw(f.dir, err, removeBundles)
			return workloadError("fetch X.509 bundles", err)
		}
		j, err := client.FetchJWTBundles(ctx)
		if err != nil {
			a.withdraw(f.dir, err, removeBundles)
			return workloadError("fetch JWT bundles", err)
		}
		w, err := client.FetchWITBundles(ctx)
		if err != nil && status.Code(err) != codes.Unimplemented {
			a.withdraw(f.dir, err, removeBundles)
			return workloadError("fetch WIT bundles", err)
		}
		return a.deliverBundles(bundleSets{x, j, w}, f.dir, true, false)
	}
	return cmd
}

// bundleSets are the bundles of each kind.
type bundleSets struct {
	x509 *x509bundle.Set
	jwt  *jwtbundle.Set
	wit  *witbundle.Set // nil: not offered
}

// bundleUpdates passes the updates of three watches on to one goroutine.
type bundleUpdates struct {
	x509   chan *x509bundle.Set
	jwt    chan *jwtbundle.Set
	wit    chan *witbundle.Set
	failed chan error
	ctx    context.Context
}

func (u *bundleUpdates) OnX509BundlesUpdate(s *x509bundle.Set) { pass(u.ctx, u.x509, s) }
func (u *bundleUpdates) OnJWTBundlesUpdate(s *jwtbundle.Set)   { pass(u.ctx, u.jwt, s) }
func (u *bundleUpdates) OnWITBundlesUpdate(s *witbundle.Set)   { pass(u.ctx, u.wit, s) }
func (u *bundleUpdates) OnX509BundlesWatchError(err error)     { failed(u, u.x509, err) }
func (u *bundleUpdates) OnJWTBundlesWatchError(err error)      { failed(u, u.jwt, err) }
func (u *bundleUpdates) OnWITBundlesWatchError(err error) {
	if status.Code(err) != codes.Unimplemented { // else there are none, and that ends the watch
		failed(u, u.wit, err)
	}
}

// failed passes on that a watch failed, and that there is nothing any more if
// it was denied.
func failed[T any](u *bundleUpdates, to chan *T, err error) {
	if status.Code(err) == codes.PermissionDenied {
		pass(u.ctx, to, nil)
	}
	pass(u.ctx, u.failed, err)
}

func pass[T any](ctx context.Context, to chan T, v T) {
	select {
	case to <- v:
	case <-ctx.Done():
	}
}

func (a *app) watchBundles(ctx context.Context, client *workloadapi.Client, f *fetching) error {
	watching, stop := context.WithCancel(ctx)
	u := &bundleUpdates{make(chan *x509bundle.Set), make(chan *jwtbundle.Set), make(chan *witbundle.Set), make(chan error), watching}
	ended := make(chan error, 3)
	go func() { ended <- client.WatchX509Bundles(watching, u) }()
	go func() { ended <- client.WatchJWTBundles(watching, u) }()
	go func() { ended <- client.WatchWITBundles(watching, u) }()
	running := 3
	defer func() {
		stop()
		for ; running > 0; running-- {
			<-ended
		}
	}()
	var got bundleSets
	offered := true // the WIT bundles
	said := ""
	for first := true; ; {
		select {
		case got.x509 = <-u.x509:
		case got.jwt = <-u.jwt:
		case got.wit = <-u.wit:
		case err := <-u.failed:
			a.withdraw(f.dir, err, removeBundles)
			said = a.watchTrouble(ctx, "fetch bundles", err, said)
			continue
		case err := <-ended:
			running--
			if status.Code(err) != codes.Unimplemented || !offered {
				return watchEnd(ctx, "fetch bundles", err)
			}
			offered = false
		case <-ctx.Done():
			return nil
		}
		if got.x509 == nil || got.jwt == nil || got.wit == nil && offered {
			continue
		}
		if err := a.deliverBundles(got, f.dir, first, true); err != nil {
			return err
		}
		a.changed(ctx, f)
		first, said = false, ""
	}
}

func (a *app) deliverBundles(got bundleSets, dir string, first, several bool) error {
	items := map[string]*bundleItem{}
	item := func(td spiffeid.TrustDomain) *bundleItem {
		if items[td.Name()] == nil {
			items[td.Name()] = &bundleItem{TrustDomain: td.Name(), X509Authorities: []x509Authority{}, JWTAuthorities: []jwtAuthority{}}
		}
		return items[td.Name()]
	}
	files := map[string][]byte{}
	for _, b := range got.x509.Bundles() {
		to := item(b.TrustDomain())
		for _, cert := range b.X509Authorities() {
			to.X509Authorities = append(to.X509Authorities, x509AuthorityOf(cert))
		}
		files[to.TrustDomain+".pem"] = certificatesPEM(b.X509Authorities()...)
	}
	for _, b := range got.jwt.Bundles() {
		to := item(b.TrustDomain())
		to.JWTAuthorities = jwtAuthoritiesOf(b.JWTAuthorities())
		doc, err := b.Marshal()
		if err != nil {
			return fmt.Errorf("encode the JWT bundle of %s: %w", to.TrustDomain, err)
		}
		files[to.TrustDomain+".jwks.json"] = doc
	}
	if got.wit != nil {
		for _, b := range got.wit.Bundles() {
			to := item(b.TrustDomain())
			to.WITAuthorities = jwtAuthoritiesOf(b.WITAuthorities())
			doc, err := b.Marshal()
			if err != nil {
				return fmt.Errorf("encode the WIT bundle of %s: %w", to.TrustDomain, err)
			}
			files[to.TrustDomain+".wit.jwks.json"] = doc
		}
	}
	if dir != "" {
		if err := writeBundles(dir, files); err != nil {
			return err
		}
	}
	sorted := make([]*bundleItem, 0, len(items))
	for _, i := range items {
		sorted = append(sorted, i)
	}
	slices.SortFunc(sorted, func(x, y *bundleItem) int { return cmp.Compare(x.TrustDomain, y.TrustDomain) })
	show := func(w io.Writer) {
		for i, b := range sorted {
			if i > 0 {
				fmt.Fprintln(w)
			}
			a.showBundle(w, b)
		}
	}
	if several {
		return a.document(first, sorted, show)
	}
	return a.print(sorted, show)
}
