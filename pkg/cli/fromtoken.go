package cli

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"

	"github.com/hallmark-id/hallmark/pkg/credential"
)

// maxExchanged bounds an answer of a token endpoint, in bytes.
const maxExchanged = 1 << 20

// exchanging is how to fetch an SVID for an outside issuer's token, without an
// agent.
type exchanging struct {
	token, endpoint, ca string
}

func (x *exchanging) register(cmd *cobra.Command) {
	cmd.Flags().StringVar(&x.token, "from-token", "", "`file` (or -) of another issuer's token to exchange for the SVID")
	cmd.Flags().StringVar(&x.endpoint, "token-endpoint", "", "`URL` of the token endpoint: the server's token_exchange.issuer")
	cmd.Flags().StringVar(&x.ca, "ca-file", "", "PEM `file` of the endpoint's authorities (default: the system's)")
}

// check checks the flags, of a command that may watch.
func (x *exchanging) check(watch bool) error {
	switch {
	case x.token == "" && (x.endpoint != "" || x.ca != ""):
		return usageError(errors.New("--token-endpoint and --ca-file go with --from-token"))
	case x.token == "":
		return nil
	case watch:
		return usageError(errors.New("--watch does not go with --from-token: a token is good once"))
	case !strings.HasPrefix(x.endpoint, "https://"):
		return usageError(errors.New("--from-token needs --token-endpoint, an https URL: a token is shown over verified TLS alone"))
	}
	return nil
}

// exchanged is an answer of a token endpoint.
type exchanged struct {
	Token       string `json:"access_token"`
	TrustBundle string `json:"trust_bundle"`
	Error       string `json:"error"`
	Description string `json:"error_description"`
}

// exchange exchanges the token.
func (a *app) exchange(ctx context.Context, x *exchanging, kind string, form url.Values) (*exchanged, error) {
	token, err := a.readToken(x.token)
	if err != nil {
		return nil, err
	}
	form.Set("grant_type", "urn:ietf:params:oauth:grant-type:token-exchange")
	form.Set("subject_token", token)
	form.Set("subject_token_type", "urn:ietf:params:oauth:token-type:jwt")
	form.Set("requested_token_type", kind)
	client, err := credential.Client(x.ca)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, strings.TrimSuffix(x.endpoint, "/")+"/token", strings.NewReader(form.Encode()))
	if err != nil {
		return nil, usageError(fmt.Errorf("--token-endpoint %q: %w", x.endpoint, err))
	}
	req.Header.Set("Content-Type", "application/x-www-form-urlencoded")
	resp, err := client.Do(req)
	if err != nil {
		return nil, fmt.Errorf("exchange the token: %w", err)
	}
	defer resp.Body.Close()
	var out exchanged
	if err := json.NewDecoder(io.LimitReader(resp.Body, maxExchanged)).Decode(&out); err != nil {
		return nil, fmt.Errorf("exchange the token: %s answers %s and no JSON; is it a token endpoint?", x.endpoint, resp.Status)
	}
	if resp.StatusCode != http.StatusOK || out.Token == "" {
		return nil, fmt.Errorf("exchange the token: %s: %s", printable(out.Error), printable(out.Description))
	}
	return &out, nil
}

// exchangeX509 fetches an X509-SVID for a token, with a key made here.
func (a *app) exchangeX509(ctx context.Context, x *exchanging, id string) (*workloadapi.X509Context, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	if err != nil {
		return nil, err
	}
	form := url.Values{"csr": {base64.StdEncoding.EncodeToString(csr)}}
	if id != "" {
		form.Set("spiffe_id", id)
	}
	got, err := a.exchange(ctx, x, "urn:hallmark:token-type:x509-svid", form)
	if err != nil {
		return nil, err
	}
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, err
	}
	svid, err := x509svid.Parse([]byte(got.Token), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}))
	if err != nil {
		return nil, fmt.Errorf("the endpoint's answer is no X509-SVID of the key: %w", err)
	}
	bundle, err := x509bundle.Parse(svid.ID.TrustDomain(), []byte(got.TrustBundle))
	if err != nil {
		return nil, fmt.Errorf("the endpoint's answer has no trust bundle: %w", err)
	}
	if _, _, err := x509svid.Verify(svid.Certificates, bundle); err != nil {
		return nil, fmt.Errorf("the endpoint's answer does not verify: %w", err)
	}
	return &workloadapi.X509Context{SVIDs: []*x509svid.SVID{svid}, Bundles: x509bundle.NewSet(bundle)}, nil
}

// exchangeJWT fetches a JWT-SVID for a token.
func (a *app) exchangeJWT(ctx context.Context, x *exchanging, id string, audience []string) (*jwtsvid.SVID, error) {
	form := url.Values{"audience": audience}
	if id != "" {
		form.Set("spiffe_id", id)
	}
	got, err := a.exchange(ctx, x, "urn:ietf:params:oauth:token-type:jwt", form)
	if err != nil {
		return nil, err
	}
	svid, err := jwtsvid.ParseInsecure(got.Token, audience[:1]) // it came over verified TLS
	if err != nil {
		return nil, fmt.Errorf("the endpoint's answer is no JWT-SVID: %w", err)
	}
	return svid, nil
}
