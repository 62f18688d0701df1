package cli

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"io"
	"net/url"
	"time"

	"github.com/spf13/cobra"
	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	bundlev1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/bundle/v1"
	svidv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/svid/v1"
)

func (a *app) svidCommand() *cobra.Command {
	return noun("svid", "see, revoke and mint SVIDs",
		"Processes get their SVIDs from an agent. For what no agent can reach, an administrator\n"+
			"may mint one. X509-SVIDs, and tokens with a status, can be taken back before their end.",
		"  hallmark svid list\n  hallmark svid revoke --spiffe-id /web\n  hallmark svid mint jwt --spiffe-id /ci --audience registry.internal",
		a.svidList(), a.svidShow(), a.svidRevoke(), a.svidRevocations(),
		noun("mint", "mint an SVID",
			"Mint issues an SVID without an agent; it ends up where you put it, so prefer an agent.",
			"  hallmark svid mint x509 --spiffe-id /legacy --write DIR\n  hallmark svid mint jwt --spiffe-id /ci --audience registry.internal",
			a.svidMintX509(), a.svidMintJWT(), a.svidMintWIT()))
}

func (a *app) svidMintX509() *cobra.Command {
	var id, dir string
	var ttl duration
	var dnsNames []string
	cmd := &cobra.Command{
		Use:   "x509",
		Short: "mint an X509-SVID",
		Long: "Mint makes a key on this machine and has the server sign an X509-SVID for it. It\n" +
			"prints chain, private key and bundle as PEM, or writes them to a directory as\n" +
			"svid.0.pem, svid.0.key and bundle.0.pem.",
		Example: "  hallmark svid mint x509 --spiffe-id /legacy --write /etc/legacy/identity\n" +
			"  hallmark svid mint x509 --spiffe-id /legacy --dns legacy.internal --ttl 12h -o json",
		Args: noArguments,
	}
	cmd.Flags().StringVar(&id, "spiffe-id", "", "the identity, as `SPIFFE-ID` or just /PATH")
	cmd.Flags().Var(&ttl, "ttl", "`lifetime`, like 1h (default the server's)")
	cmd.Flags().StringArrayVar(&dnsNames, "dns", nil, "DNS `name` in it; repeat for several")
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
		svid, err := mintX509(ctx, c, idText(spiffeID), dnsNames, seconds)
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
		roots := bundle.X509Authorities()
		if dir != "" {
			if err := writeX509(dir, []*x509svid.SVID{svid}, [][]*x509.Certificate{roots}); err != nil {
				return err
			}
		}
		item, err := x509Of(svid, roots)
		if err != nil {
			return err
		}
		if dir == "" { // else it is in the file, and only there
			if item.PrivateKey, err = keyPEM(svid); err != nil {
				return err
			}
		}
		return a.print(item, func(w io.Writer) {
			if dir != "" {
				a.showX509(w, svid, roots)
				a.remark("\nWritten to %s.", dir)
				return
			}
			fmt.Fprintf(w, "%s%s%s", item.Chain, item.PrivateKey, certificatesPEM(roots...))
		})
	}
	return cmd
}

// mintX509 has the server sign for a key made here.
func mintX509(ctx context.Context, c *admin, id string, dnsNames []string, ttl int32) (*x509svid.SVID, error) {
	uri, err := url.Parse(id)
	if err != nil {
		return nil, fmt.Errorf("mint an X509-SVID: %w", err)
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("make a key: %w", err)
	}
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{
		Subject: pkix.Name{}, URIs: []*url.URL{uri}, DNSNames: dnsNames,
	}, key)
	if err != nil {
		return nil, fmt.Errorf("make a certificate request: %w", err)
	}
	resp, err := c.svids().MintX509SVID(ctx, &svidv1.MintX509SVIDRequest{Csr: csr, Ttl: ttl})
	if err != nil {
		return nil, rpcError("mint an X509-SVID for "+id, err)
	}
	svid := &x509svid.SVID{PrivateKey: key, Hint: resp.GetSvid().GetHint()}
	for _, der := range resp.GetSvid().GetCertChain() {
		cert, err := x509.ParseCertificate(der)
		if err != nil {
			return nil, fmt.Errorf("read the minted X509-SVID: %w", err)
		}
		svid.Certificates = append(svid.Certificates, cert)
	}
	if len(svid.Certificates) == 0 {
		return nil, errors.New("mint an X509-SVID: the server sent no certificate")
	}
	if svid.ID, err = x509svid.IDFromCert(svid.Certificates[0]); err != nil {
		return nil, fmt.Errorf("read the minted X509-SVID: %w", err)
	}
	if public, ok := svid.Certificates[0].PublicKey.(interface{ Equal(crypto.PublicKey) bool }); !ok || !public.Equal(key.Public()) {
		return nil, errors.New("mint an X509-SVID: the server signed another key")
	}
	return svid, nil
}

func (a *app) svidMintJWT() *cobra.Command {
	var id string
	var audience []string
	var ttl duration
	cmd := &cobra.Command{
		Use:   "jwt",
		Short: "mint a JWT-SVID",
		Long:  "Mint has the server sign a JWT-SVID and prints the token.",
		Example: "  hallmark svid mint jwt --spiffe-id /ci --audience registry.internal --ttl 10m\n" +
			"  hallmark svid mint jwt --spiffe-id /ci --audience a --audience b -o json",
		Args: noArguments,
	}
	cmd.Flags().StringVar(&id, "spiffe-id", "", "the identity, as `SPIFFE-ID` or just /PATH")
	cmd.Flags().StringArrayVar(&audience, "audience", nil, "`name` of whom the token is for; repeat for several")
	cmd.Flags().Var(&ttl, "ttl", "`lifetime`, like 1h (default the server's)")
	socket := socketFlag(cmd, serverSocket)
	a.outputFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		if err := required(cmd, "spiffe-id", "audience"); err != nil {
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
		resp, err := c.svids().MintJWTSVID(ctx, &svidv1.MintJWTSVIDRequest{Id: spiffeID, Audience: audience, Ttl: seconds})
		if err != nil {
			return rpcError("mint a JWT-SVID for "+idText(spiffeID), err)
		}
		svid, err := jwtsvid.ParseInsecure(resp.GetSvid().GetToken(), audience)
		if err != nil {
			return fmt.Errorf("read the minted JWT-SVID: %w", err)
		}
		item := jwtOf(svid)
		return a.print(item, func(w io.Writer) {
			fmt.Fprintln(w, item.Token)
			a.remark("%s, until %s", item.SPIFFEID, a.moment(*item.ExpiresAt))
		})
	}
	return cmd
}

// jwtItem is a JWT-SVID as commands print it.
type jwtItem struct {
	SPIFFEID  string         `json:"spiffe_id"`
	Audience  []string       `json:"audience"`
	ExpiresAt *time.Time     `json:"expires_at"`
	Hint      string         `json:"hint,omitempty"`
	Token     string         `json:"token,omitempty"`
	Claims    map[string]any `json:"claims"`
}

func jwtOf(s *jwtsvid.SVID) jwtItem {
	return jwtItem{
		SPIFFEID: s.ID.String(), Audience: s.Audience, ExpiresAt: timestamp(s.Expiry.Unix()),
		Hint: s.Hint, Token: s.Marshal(), Claims: s.Claims,
	}
}
