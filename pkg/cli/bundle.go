package cli

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/pem"
	"fmt"
	"io"
	"maps"
	"slices"
	"time"

	"github.com/spf13/cobra"
	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	bundlev1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/bundle/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
)

const (
	outputPEM    = "pem"
	outputSPIFFE = "spiffe"
)

func (a *app) bundleCommand() *cobra.Command {
	return noun("bundle", "see what others need to verify this trust domain, and set what foreign ones need",
		"A bundle is the public authorities of a trust domain.",
		"  hallmark bundle show\n  hallmark bundle show -o pem > roots.pem\n  hallmark bundle set other.org other.json",
		a.bundleShow(), a.bundleList(), a.bundleSet(), a.bundleDelete())
}

// bundleItem is a bundle as commands print it.
type bundleItem struct {
	TrustDomain     string          `json:"trust_domain"`
	X509Authorities []x509Authority `json:"x509_authorities"`
	JWTAuthorities  []jwtAuthority  `json:"jwt_authorities"`
	WITAuthorities  []jwtAuthority  `json:"wit_authorities,omitempty"` // experimental
	SequenceNumber  uint64          `json:"sequence_number,omitempty"`
	RefreshHint     string          `json:"refresh_hint,omitempty"`
}

type x509Authority struct {
	SubjectKeyID string     `json:"subject_key_id"` // hexadecimal; the authority's ID
	Subject      string     `json:"subject"`
	KeyType      string     `json:"key_type"`
	NotBefore    *time.Time `json:"not_before"`
	ExpiresAt    *time.Time `json:"expires_at"`
	SHA256       string     `json:"sha256"` // of the DER, hexadecimal
	Tainted      bool       `json:"tainted"`
	Certificate  string     `json:"certificate"` // PEM
}

// jwtAuthority is a key that signs JWT-SVIDs, or WIT-SVIDs.
type jwtAuthority struct {
	KeyID     string     `json:"key_id"`
	KeyType   string     `json:"key_type"`
	ExpiresAt *time.Time `json:"expires_at,omitempty"`
	Tainted   bool       `json:"tainted"`
	PublicKey string     `json:"public_key"` // PEM
}

func x509AuthorityOf(cert *x509.Certificate) x509Authority {
	sum := sha256.Sum256(cert.Raw)
	return x509Authority{
		SubjectKeyID: hex.EncodeToString(cert.SubjectKeyId), Subject: cert.Subject.String(), KeyType: keyType(cert.PublicKey),
		NotBefore: timestamp(cert.NotBefore.Unix()), ExpiresAt: timestamp(cert.NotAfter.Unix()),
		SHA256: hex.EncodeToString(sum[:]), Certificate: string(certificatesPEM(cert)),
	}
}

func jwtAuthorityOf(kid string, key crypto.PublicKey) jwtAuthority {
	out := jwtAuthority{KeyID: kid, KeyType: keyType(key)}
	if der, err := x509.MarshalPKIXPublicKey(key); err == nil {
		out.PublicKey = string(pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der}))
	}
	return out
}

// jwtAuthoritiesOf returns keys by their IDs.
func jwtAuthoritiesOf(keys map[string]crypto.PublicKey) []jwtAuthority {
	out := make([]jwtAuthority, 0, len(keys))
	for _, kid := range slices.Sorted(maps.Keys(keys)) {
		out = append(out, jwtAuthorityOf(kid, keys[kid]))
	}
	return out
}

// bundleOf reads a bundle of the contracts.
func bundleOf(b *types.Bundle) (*bundleItem, *spiffebundle.Bundle, error) {
	td, err := spiffeid.TrustDomainFromString(b.TrustDomain)
	if err != nil {
		return nil, nil, fmt.Errorf("the bundle's trust domain: %w", err)
	}
	out := &bundleItem{TrustDomain: td.Name(), SequenceNumber: b.SequenceNumber, X509Authorities: []x509Authority{}, JWTAuthorities: []jwtAuthority{}}
	whole := spiffebundle.New(td)
	whole.SetSequenceNumber(b.SequenceNumber)
	if b.RefreshHint > 0 {
		hint := time.Duration(b.RefreshHint) * time.Second
		out.RefreshHint = hint.String()
		whole.SetRefreshHint(hint)
	}
	for i, x := range b.X509Authorities {
		certs, err := x509.ParseCertificates(x.Asn1)
		if err != nil {
			return nil, nil, fmt.Errorf("the bundle's X.509 authority %d: %w", i+1, err)
		}
		for _, cert := range certs {
			item := x509AuthorityOf(cert)
			item.Tainted = x.Tainted
			out.X509Authorities = append(out.X509Authorities, item)
			whole.AddX509Authority(cert)
		}
	}
	for _, j := range b.JwtAuthorities {
		key, err := x509.ParsePKIXPublicKey(j.PublicKey)
		if err != nil {
			return nil, nil, fmt.Errorf("the bundle's JWT authority %q: %w", j.KeyId, err)
		}
		item := jwtAuthorityOf(j.KeyId, key)
		item.ExpiresAt, item.Tainted = timestamp(j.ExpiresAt), j.Tainted
		out.JWTAuthorities = append(out.JWTAuthorities, item)
		if err := whole.AddJWTAuthority(j.KeyId, key); err != nil {
			return nil, nil, fmt.Errorf("the bundle's JWT authority: %w", err)
		}
	}
	for _, w := range b.WitAuthorities {
		key, err := x509.ParsePKIXPublicKey(w.PublicKey)
		if err != nil {
			return nil, nil, fmt.Errorf("the bundle's WIT authority %q: %w", w.KeyId, err)
		}
		item := jwtAuthorityOf(w.KeyId, key)
		item.ExpiresAt, item.Tainted = timestamp(w.ExpiresAt), w.Tainted
		out.WITAuthorities = append(out.WITAuthorities, item)
		if err := whole.AddWITAuthority(w.KeyId, key); err != nil {
			return nil, nil, fmt.Errorf("the bundle's WIT authority: %w", err)
		}
	}
	return out, whole, nil
}

func (a *app) bundleShow() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "show",
		Short: "show the trust domain's own bundle",
		Long: "Show prints the authorities that verify SVIDs of this trust domain: as a table, in\n" +
			"JSON or YAML, as PEM (X.509 only), or as the SPIFFE bundle document that agents\n" +
			"(trust_bundle) and other trust domains read.",
		Example: "  hallmark bundle show\n  hallmark bundle show -o pem > roots.pem\n  hallmark bundle show -o spiffe > example.org.json",
		Args:    noArguments,
	}
	socket := socketFlag(cmd, serverSocket)
	a.outputFlag(cmd, outputPEM, outputSPIFFE)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		ctx, cancel := context.WithTimeout(cmd.Context(), callTimeout)
		defer cancel()
		c, err := a.admin(ctx, *socket)
		if err != nil {
			return err
		}
		defer c.Close()
		resp, err := c.bundles().GetBundle(ctx, &bundlev1.GetBundleRequest{})
		if err != nil {
			return rpcError("get the bundle", err)
		}
		item, whole, err := bundleOf(resp)
		if err != nil {
			return err
		}
		switch a.output {
		case outputPEM:
			_, err := a.out.Write(certificatesPEM(whole.X509Authorities()...))
			return err
		case outputSPIFFE:
			doc, err := whole.Marshal()
			if err != nil {
				return fmt.Errorf("encode the bundle: %w", err)
			}
			_, err = fmt.Fprintf(a.out, "%s\n", bytes.TrimSpace(doc))
			return err
		}
		return a.print(item, func(w io.Writer) { a.showBundle(w, item) })
	}
	return cmd
}

func (a *app) showBundle(w io.Writer, b *bundleItem) {
	fmt.Fprintf(w, "%s", a.style.bold("spiffe://"+b.TrustDomain))
	if b.SequenceNumber > 0 {
		fmt.Fprintf(w, "%s", a.style.dim(fmt.Sprintf("  sequence %d", b.SequenceNumber)))
	}
	fmt.Fprint(w, "\n\n")
	t := table{style: a.style, header: []string{"AUTHORITY", "ID", "KEY", "EXPIRES", ""}}
	mark := func(tainted bool) cell {
		if tainted {
			return painted(a.style.yellow, "tainted")
		}
		return cell{}
	}
	for _, x := range b.X509Authorities {
		t.add(text("X.509"), text(x.SubjectKeyID), text(x.KeyType), text(a.momentOf(x.ExpiresAt)), mark(x.Tainted))
	}
	for _, j := range b.JWTAuthorities {
		t.add(text("JWT"), text(j.KeyID), text(j.KeyType), text(a.momentOf(j.ExpiresAt)), mark(j.Tainted))
	}
	for _, w := range b.WITAuthorities {
		t.add(text("WIT"), text(w.KeyID), text(w.KeyType), text(a.momentOf(w.ExpiresAt)), mark(w.Tainted))
	}
	io.WriteString(w, t.String())
}

func (a *app) momentOf(t *time.Time) string {
	if t == nil {
		return ""
	}
	return a.moment(*t)
}

// keyType names a public key's kind as the configuration does.
func keyType(key crypto.PublicKey) string {
	switch k := key.(type) {
	case *ecdsa.PublicKey:
		return fmt.Sprintf("ec-p%d", k.Curve.Params().BitSize)
	case *rsa.PublicKey:
		return fmt.Sprintf("rsa-%d", k.N.BitLen())
	case ed25519.PublicKey:
		return "ed25519"
	}
	return fmt.Sprintf("%T", key)
}

func certificatesPEM(certs ...*x509.Certificate) []byte {
	var out []byte
	for _, c := range certs {
		out = append(out, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Raw})...)
	}
	return out
}
