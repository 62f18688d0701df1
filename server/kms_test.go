//go:build pkcs11 && cgo

package server_test

import (
	"context"
	"fmt"
	"strings"
	"testing"

	svidv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/svid/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/hallmark-id/hallmark/test/harness"
)

func TestPKCS11_AServerIsNotReadyWhileItsTokenIsAway(t *testing.T) {
	token := harness.NewSoftHSM(t)
	address := harness.FreeAddress(t)
	dir := newDir(t)
	src := configure(dir)
	src.Data = fmt.Appendf(src.Data, "keys: {kms: {uri: '%s', pin_file: '%s'}}\ntelemetry: {listen: '%s'}\n", token.URI, token.PINFile, address)
	r := startWith(t, dir, src)
	r.mint()
	mint := func() error {
		_, err := svidv1.NewSVIDClient(r.conn).MintJWTSVID(t.Context(), &svidv1.MintJWTSVIDRequest{
			Id: &types.SPIFFEID{TrustDomain: "example.org", Path: "/x"}, Audience: []string{"a"},
		})
		return err
	}
	if err := mint(); err != nil {
		t.Error(err)
	}

	token.TakeAway(t)
	if err := mint(); status.Code(err) != codes.Unavailable || !strings.Contains(err.Error(), "keys of the authorities") {
		t.Errorf("without its token it says %v", err)
	}
	if code, body := get(t, "http://"+address+"/ready"); code != 503 || !strings.Contains(body, "PKCS #11") {
		t.Errorf("/ready without its token: %d %s", code, body)
	}
	token.BringBack(t)
	harness.Eventually(t, "be ready again", func(context.Context) error {
		if code, body := get(t, "http://"+address+"/ready"); code != 200 {
			return fmt.Errorf("%d %s", code, body)
		}
		return nil
	})
	r.mint()
	if err := mint(); err != nil {
		t.Error(err)
	}
	if err := r.stop(); err != nil {
		t.Error(err)
	}
}
