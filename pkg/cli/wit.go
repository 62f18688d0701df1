package cli

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/json"
	"fmt"
	"io"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"
	"github.com/spf13/cobra"
	"github.com/spiffe/go-spiffe/v2/exp/bundle/witbundle"
	"github.com/spiffe/go-spiffe/v2/exp/svid/witsvid"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	bundlev1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/bundle/v1"
	svidv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/svid/v1"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// witItem is a WIT-SVID as commands print it.
type witItem struct {
	SPIFFEID    string     `json:"spiffe_id"`
	Hint        string     `json:"hint,omitempty"`
	KeyType     string     `json:"key_type"`
	ExpiresAt   *time.Time `json:"expires_at"`
	AuthorityID string     `json:"authority_id"` // the kid
	Verified    bool       `json:"verified"`     // against the bundle of its trust domain
	Token       string     `json:"token"`
	PrivateKey  string     `json:"private_key,omitempty"` // JWK

	err error // why it is not verified
	key []byte
}

func witOf(s *witsvid.SVID, bundles witbundle.Source) (*witItem, error) {
	item := &witItem{
		SPIFFEID: s.ID.String(), Hint: s.Hint, KeyType: keyType(s.PublicKey), ExpiresAt: timestamp(s.Expiry.Unix()),
		AuthorityID: s.KeyID, Token: s.Marshal(),
	}
	_, item.err = witsvid.ParseAndValidate(item.Token, bundles)
	item.Verified = item.err == nil
	var err error
	item.key, err = privateJWK(s)
	return item, err
}

// privateJWK returns the key of a WIT-SVID, with the algorithm that the token
// says it is for.
func privateJWK(s *witsvid.SVID) ([]byte, error) {
	parsed, err := jwt.ParseSigned(s.Marshal(), []jose.SignatureAlgorithm{
		jose.RS256, jose.RS384, jose.RS512, jose.ES256, jose.ES384, jose.ES512, jose.PS256, jose.PS384, jose.PS512,
	})
	var claims struct {
		Confirmation struct {
			JWK jose.JSONWebKey `json:"jwk"`
		} `json:"cnf"`
	}
	if err == nil {
		err = parsed.UnsafeClaimsWithoutVerification(&claims)
	}
	if err != nil {
		return nil, fmt.Errorf("read the WIT-SVID of %s: %w", s.ID, err)
	}
	signer, ok := s.PrivateKey.(crypto.Signer)
	if ok {
		public, comparable := signer.Public().(interface{ Equal(crypto.PublicKey) bool })
		ok = comparable && public.Equal(s.PublicKey)
	}
	if !ok {
		return nil, fmt.Errorf("the WIT-SVID of %s came with another key than its own", s.ID)
	}
	return json.Marshal(jose.JSONWebKey{Key: s.PrivateKey, Algorithm: claims.Confirmation.JWK.Algorithm})
}

// showWIT prints a WIT-SVID for people: not the token, which is of no use
// without a proof.
func (a *app) showWIT(w io.Writer, item *witItem) {
	fmt.Fprintln(w, a.style.bold(item.SPIFFEID))
	d := details{style: a.style}
	d.add("Hint", item.Hint)
	d.add("Expires", a.momentOf(item.ExpiresAt))
	d.add("Key", item.KeyType)
	d.add("Issued by", "authority "+item.AuthorityID)
	if item.err != nil {
		d.addPainted("Verified", a.style.red, "no: "+item.err.Error())
	} else {
		d.addPainted("Verified", a.style.green, "yes, against its bundle")
	}
	io.WriteString(w, d.String())
}

const fetchingWIT = "fetch WIT-SVIDs"

func (a *app) fetchWIT() *cobra.Command {
	var f fetching
	var id string
	cmd := &cobra.Command{
		Use:   "wit",
		Short: "fetch WIT-SVIDs (experimental)",
		Long: "Fetch prints the WIT-SVIDs of this process. With --write it also writes each as\n" +
			"svid.N.wit (token) and svid.N.jwk (private key, for this user only); with --watch it\n" +
			"keeps them current until it is interrupted.\n\n" +
			"A WIT-SVID is bound to its key: it is presented with a proof that its holder made with\n" +
			"that key, never alone. The standard may still change, so server and agent have to be\n" +
			"told to offer it (experimental: wit).",
		Example: "  hallmark fetch wit\n  hallmark fetch wit -o json | jq -r .[0].token\n  hallmark fetch wit --write /run/identity --watch",
		Args:    noArguments,
	}
	cmd.Flags().StringVar(&id, "spiffe-id", "", "only for this `SPIFFE-ID` of the identities")
	f.register(cmd, "go on, and print (and write) again at each change")
	a.outputFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		if err := f.check(); err != nil {
			return err
		}
		if id != "" {
			if _, err := spiffeid.FromString(id); err != nil {
				return usageError(fmt.Errorf("--spiffe-id %q: %w", id, err))
			}
		}
		ctx := cmd.Context()
		client, err := workload(ctx, *f.socket, workloadapi.WithBackoffStrategy(watchRetry))
		if err != nil {
			return err
		}
		defer client.Close()
		w := &witWatcher{app: a, client: client, ctx: ctx, fetching: &f, first: true}
		if f.watch {
			return watchEnd(ctx, fetchingWIT, client.WatchWITSVIDs(ctx, w, id))
		}
		callCtx, cancel := context.WithTimeout(ctx, callTimeout)
		defer cancel()
		svids, err := client.FetchWITSVIDs(callCtx, id)
		if err != nil {
			a.withdraw(f.dir, err, removeWIT)
			return workloadError(fetchingWIT, err)
		}
		return w.deliver(svids)
	}
	return cmd
}

// witWatcher delivers each update of a watch. One goroutine calls it.
type witWatcher struct {
	app      *app
	client   *workloadapi.Client
	ctx      context.Context
	fetching *fetching
	first    bool
	said     string // the last error that was told
}

func (w *witWatcher) OnWITSVIDsUpdate(svids []*witsvid.SVID) {
	if err := w.deliver(svids); err != nil {
		w.app.remark("%v", err)
		return
	}
	w.first, w.said = false, ""
	w.app.changed(w.ctx, w.fetching)
}

func (w *witWatcher) OnWITSVIDsWatchError(err error) {
	w.app.withdraw(w.fetching.dir, err, removeWIT)
	if status.Code(err) != codes.Unimplemented { // else the watch ends, and says so
		w.said = w.app.watchTrouble(w.ctx, fetchingWIT, err, w.said)
	}
}

// deliver prints and writes what one answer of the Workload API holds.
func (w *witWatcher) deliver(svids []*witsvid.SVID) error {
	ctx, cancel := context.WithTimeout(w.ctx, callTimeout)
	defer cancel()
	bundles, err := w.client.FetchWITBundles(ctx)
	if err != nil {
		return workloadError("fetch WIT bundles", err)
	}
	items := make([]*witItem, len(svids))
	for i, s := range svids {
		if items[i], err = witOf(s, bundles); err != nil {
			return err
		}
	}
	if dir := w.fetching.dir; dir != "" {
		if err := writeWIT(dir, items); err != nil {
			return err
		}
	}
	a := w.app
	show := func(out io.Writer) {
		for i, item := range items {
			if i > 0 {
				fmt.Fprintln(out)
			}
			a.showWIT(out, item)
		}
	}
	if w.fetching.watch {
		err = a.document(w.first, items, show)
	} else {
		err = a.print(items, show)
	}
	if err == nil && w.fetching.dir != "" && a.output == outputTable {
		a.remark("%s written to %s.", count(len(items), "SVID", "SVIDs"), w.fetching.dir)
	}
	return err
}

func (a *app) svidMintWIT() *cobra.Command {
	var id, dir string
	var ttl duration
	cmd := &cobra.Command{
		Use:   "wit",
		Short: "mint a WIT-SVID (experimental)",
		Long: "Mint makes a key on this machine and has the server sign a WIT-SVID for it. It prints\n" +
			"the token and the private key (a JWK), a line each, or writes them to a directory as\n" +
			"svid.0.wit and svid.0.jwk. The server has to be told to offer it (experimental: wit).",
		Example: "  hallmark svid mint wit --spiffe-id /legacy --write /etc/legacy/identity\n" +
			"  hallmark svid mint wit --spiffe-id /legacy --ttl 12h -o json",
		Args: noArguments,
	}
	cmd.Flags().StringVar(&id, "spiffe-id", "", "the identity, as `SPIFFE-ID` or just /PATH")
	cmd.Flags().Var(&ttl, "ttl", "`lifetime`, like 1h (default the server's)")
	cmd.Flags().StringVar(&dir, "write", "", "`DIR` to write files to")
	_ = cmd.MarkFlagDirname("write") // fails only for a flag that does not exist
	socket := socketFlag(cmd, serverSocket)
	a.outputFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		if err := required(cmd, "spiffe-id"); err != nil {
			return err
		}
		seconds, err := ttl.seconds("--ttl")
		if err != nil {
			return err
		}
		ctx, cancel := context.WithTimeout(cmd.Context(), callTimeout)
		defer cancel()
		c, err := a.admin(ctx, *socket)
		if err != nil {
			return err
		}
		defer c.Close()
		spiffeID, err := c.id(ctx, "--spiffe-id", id)
		if err != nil {
			return err
		}
		svid, err := mintWIT(ctx, c, &svidv1.MintWITSVIDRequest{Id: spiffeID, Ttl: seconds})
		if err != nil {
			return err
		}
		resp, err := c.bundles().GetBundle(ctx, &bundlev1.GetBundleRequest{})
		if err != nil {
			return rpcError("get the bundle", err)
		}
		_, bundle, err := bundleOf(resp)
		if err != nil {
			return err
		}
		item, err := witOf(svid, bundle)
		if err != nil {
			return err
		}
		if dir != "" {
			if err := writeWIT(dir, []*witItem{item}); err != nil {
				return err
			}
		} else { // else it is in the file, and only there
			item.PrivateKey = string(item.key)
		}
		return a.print(item, func(w io.Writer) {
			if dir != "" {
				a.showWIT(w, item)
				a.remark("\nWritten to %s.", dir)
				return
			}
			fmt.Fprintf(w, "%s\n%s\n", item.Token, item.PrivateKey)
			a.remark("%s, until %s", item.SPIFFEID, a.moment(*item.ExpiresAt))
		})
	}
	return cmd
}

// mintWIT has the server sign for a key made here.
func mintWIT(ctx context.Context, c *admin, req *svidv1.MintWITSVIDRequest) (*witsvid.SVID, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("make a key: %w", err)
	}
	if req.PublicKey, err = x509.MarshalPKIXPublicKey(key.Public()); err != nil {
		return nil, fmt.Errorf("encode a public key: %w", err)
	}
	req.SigningAlgorithm = string(jose.ES256)
	resp, err := c.svids().MintWITSVID(ctx, req)
	if err != nil {
		return nil, rpcError("mint a WIT-SVID for "+idText(req.Id), err)
	}
	svid, err := witsvid.ParseInsecure(resp.GetSvid().GetToken())
	if err != nil {
		return nil, fmt.Errorf("read the minted WIT-SVID: %w", err)
	}
	svid.PrivateKey, svid.Hint = key, resp.GetSvid().GetHint()
	return svid, nil
}
